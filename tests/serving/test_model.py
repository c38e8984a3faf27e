"""The forward pass against a plain one, through every path that rows can take."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving.tiny_model import CONFIG, PlainModel

from xccl.serving.batch import PREFILL_CHUNK, PrefillChunk, build_batch
from xccl.serving.kv_cache import PagedKVCache
from xccl.serving.local_experts import LocalExperts
from xccl.serving.model import MoEModel

NONE = np.empty(0, np.int64)


@pytest.fixture(scope="module")
def model(tiny_model):
    return MoEModel.load(tiny_model, LocalExperts(CONFIG["num_experts"], None), np.arange(CONFIG["num_experts"]))


@pytest.fixture(scope="module")
def plain(tiny_model):
    return PlainModel(tiny_model)


def new_cache(model, slots=3, blocks=60):
    return PagedKVCache(model.num_cache_layers, slots, CONFIG["max_context"], model.config.kv_width, blocks)


def chunks_of(slot, length):
    return [PrefillChunk(slot, a, min(a + PREFILL_CHUNK, length)) for a in range(0, length, PREFILL_CHUNK)]


def random_tokens(length, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG["vocab_size"], length)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_prefill_equals_plain_forward(model, plain, length):
    tokens = random_tokens(length)
    cache = new_cache(model)
    assert cache.reserve(1, length)
    x = model.forward(tokens, build_batch(cache, chunks_of(1, length), NONE, NONE), cache)
    np.testing.assert_allclose(model.logits(x), plain.logits(plain.forward(tokens)), atol=1e-3)


def test_mtp_block_equals_plain_forward(model, plain):
    tokens = random_tokens(101)
    cache = new_cache(model)
    assert cache.reserve(0, 100)
    batch = build_batch(cache, chunks_of(0, 100), NONE, NONE)
    y = model.mtp_forward(model.forward(tokens[:-1], batch, cache), tokens[1:], batch, cache)
    expected = plain.mtp_logits(plain.forward(tokens[:-1]), tokens[1:])
    np.testing.assert_allclose(model.mtp_logits(y), expected, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 2])
def test_decode_equals_plain_forward(model, plain, rows):
    """One row a step, or a row with a draft that turns out right; crosses two context lengths."""
    tokens = random_tokens(140)
    prompt = 50
    cache = new_cache(model)
    assert cache.reserve(2, len(tokens))
    logits = [model.logits(model.forward(tokens[:prompt], build_batch(cache, chunks_of(2, prompt), NONE, NONE), cache))]
    slot = np.array([2])
    for i in range(prompt, len(tokens), rows):
        draft = (slot, np.array([i + 1])) if rows == 2 else (NONE, NONE)
        batch = build_batch(cache, [], slot, np.array([i]), *draft)
        logits.append(model.logits(model.forward(tokens[i : i + rows], batch, cache)))
    np.testing.assert_allclose(np.concatenate(logits), plain.logits(plain.forward(tokens)), atol=1e-3)


def test_rows_of_a_mixed_step_are_those_of_separate_steps(model):
    """Bitwise: two decoding slots, one with a draft, beside a prefill chunk."""
    texts = [random_tokens(90, seed) for seed in range(3)]

    def prepared():
        cache = new_cache(model)
        for slot in (0, 2):
            assert cache.reserve(slot, 90)
            model.forward(texts[slot][:63], build_batch(cache, chunks_of(slot, 63), NONE, NONE), cache)
        assert cache.reserve(1, 90)
        return cache

    cache = prepared()
    batch = build_batch(
        cache, [PrefillChunk(1, 0, 20)], np.array([0, 2]), np.array([63, 63]), np.array([2]), np.array([64])
    )
    together = model.forward(
        np.concatenate([texts[1][:20], texts[0][63:64], texts[2][63:64], texts[2][64:65]]), batch, cache
    )
    cache = prepared()
    parts = [model.forward(texts[1][:20], build_batch(cache, [PrefillChunk(1, 0, 20)], NONE, NONE), cache)]
    for slot, position in ((0, 63), (2, 63), (2, 64)):
        alone = build_batch(cache, [], np.array([slot]), np.array([position]))
        parts.append(model.forward(texts[slot][position : position + 1], alone, cache))
    assert np.array_equal(together, np.concatenate(parts))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), lengths=st.lists(st.integers(1, 90), min_size=1, max_size=3))
def test_paged_cache_holds_what_a_dense_one_would(seed, lengths):
    rng = np.random.default_rng(seed)
    cache = PagedKVCache(2, len(lengths), 128, 5, 40)
    dense = np.zeros((2, len(lengths), 128, 5), np.float32)
    for slot, length in enumerate(lengths):
        assert cache.reserve(slot, length)
    for slot, length in enumerate(lengths):
        positions = rng.permutation(length)
        rows = cache.row_index(np.full(length, slot), positions)
        for layer in range(2):
            values = rng.standard_normal((length, 5)).astype(np.float32)
            cache.write(layer, rows, values)
            dense[layer, slot, positions] = values
    for layer in range(2):
        got = cache.gather(layer, np.arange(len(lengths)), 128)
        for slot, length in enumerate(lengths):
            assert np.array_equal(got[slot, :length], dense[layer, slot, :length])


def test_zero_rows(model):
    cache = new_cache(model)
    batch = build_batch(cache, [], NONE, NONE)
    x = model.forward(NONE, batch, cache)
    assert x.shape == (0, CONFIG["hidden"])
    assert model.mtp_forward(x, NONE, batch, cache).shape == (0, CONFIG["hidden"])
