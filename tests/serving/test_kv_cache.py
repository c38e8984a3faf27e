import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xccl.serving.kv_cache import BLOCK_TOKENS, NULL_BLOCK, BlockAllocator, PagedKVCache, blocks_for


@given(st.lists(st.integers(0, 9), max_size=30), st.randoms(use_true_random=False))
def test_allocator_never_hands_out_a_block_twice(sizes, random):
    pool = BlockAllocator(20)
    held: list[list[int]] = []
    for size in sizes:
        blocks = pool.allocate(size)
        if blocks is None:
            assert size > pool.num_free
        else:
            held.append(blocks)
        if held and random.random() < 0.4:
            pool.release(held.pop(random.randrange(len(held))))
        owned = [block for blocks in held for block in blocks]
        assert len(set(owned)) == len(owned)
        assert NULL_BLOCK not in owned
        assert pool.num_free == 20 - len(owned)


def test_releasing_what_is_free_is_an_error():
    pool = BlockAllocator(3)
    blocks = pool.allocate(2)
    pool.release(blocks)
    with pytest.raises(ValueError, match="not allocated"):
        pool.release(blocks[:1])
    with pytest.raises(ValueError, match="not allocated"):
        pool.release([NULL_BLOCK])


def test_reserve_is_all_or_nothing_and_release_gives_all_back():
    cache = PagedKVCache(1, 2, 128, 4, num_blocks=5)
    assert cache.reserve(0, 3 * BLOCK_TOKENS + 1)
    assert cache.allocator.num_free == 1
    assert not cache.reserve(1, 2 * BLOCK_TOKENS)
    assert cache.allocator.num_free == 1
    with pytest.raises(ValueError, match="slot 0 already owns 4 blocks"):
        cache.reserve(0, 1)
    cache.release(0)
    assert cache.reserve(1, 5 * BLOCK_TOKENS)


def test_context_beyond_the_reservation_is_that_of_the_null_block():
    """Also when the slot had more blocks before."""
    cache = PagedKVCache(1, 1, 128, 4, num_blocks=8)
    assert cache.reserve(0, 128)
    cache.write(0, cache.row_index(np.zeros(128, np.int64), np.arange(128)), np.ones((128, 4), np.float32))
    cache.release(0)
    assert cache.reserve(0, 5)
    assert not cache.gather(0, np.array([0]), 128)[0, BLOCK_TOKENS:].any()


def test_blocks_for():
    assert [blocks_for(n) for n in (0, 1, BLOCK_TOKENS, BLOCK_TOKENS + 1)] == [0, 1, 1, 2]
