"""xccl.reference against the definitions, written as loops over single tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_support import DTYPES

from xccl import reference


@given(st.integers(1, 300), st.integers(1, 40))
def test_default_map_is_balanced_and_contiguous(num_experts: int, num_ranks: int) -> None:
    owner = reference.default_expert_map(num_experts, num_ranks)
    sizes = np.bincount(owner, minlength=num_ranks)
    assert len(owner) == num_experts
    assert (np.diff(owner) >= 0).all()
    assert (np.diff(sizes) <= 0).all()
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 2**32 - 1), hidden=st.integers(1, 200), exponent=st.integers(-20, 12))
def test_int8_is_within_half_a_step(dtype: np.dtype, seed: int, hidden: int, exponent: int) -> None:
    x = np.ldexp(np.random.default_rng(seed).standard_normal((5, hidden)), exponent).astype(dtype)
    q, scales = reference.quantize(x)
    wide = x.astype(np.float64)
    np.testing.assert_array_equal(scales, np.abs(x.astype(np.float32)).max(axis=1) / np.float32(127))
    back = q.astype(np.float64) * scales.astype(np.float64)[:, None]
    assert (np.abs(back - wide) <= scales[:, None] * (0.5 + 1e-4)).all()
    np.testing.assert_array_equal(np.abs(q.astype(int)).max(axis=1)[scales > 0], 127)


def test_rows_that_have_no_scale() -> None:
    x = np.array([[0, -0.0], [1e-40, 0], [np.inf, 1], [1, np.nan]], np.float32)
    q, scales = reference.quantize(x)
    assert not q.any()
    np.testing.assert_array_equal(scales, np.array([0, 0, np.nan, np.nan], np.float32))
    back = reference.dequantize(q, scales, np.float32)
    np.testing.assert_array_equal(back, [[0, 0], [0, 0], [np.nan, np.nan], [np.nan, np.nan]])


def test_dispatch_example() -> None:
    """Three experts on two ranks: 0 and 1 on rank 0, 2 on rank 1."""
    x0, x1 = np.array([[1], [2]], np.float32), np.array([[3]], np.float32)
    first, second = reference.dispatch([x0, x1], [[[1, 0], [2, 1]], [[-1, 1]]], 3)
    np.testing.assert_array_equal(first.recv_x, [[1], [1], [2], [3]])
    np.testing.assert_array_equal(first.num_recv_tokens_per_expert, [1, 3])
    np.testing.assert_array_equal(first.src_rank, [0, 0, 0, 1])
    np.testing.assert_array_equal(first.src_token, [0, 0, 1, 0])
    np.testing.assert_array_equal(first.src_slot, [1, 0, 1, 1])
    np.testing.assert_array_equal(second.recv_x, [[2]])
    outs = reference.combine([first.recv_x, second.recv_x * 10], [[[1, 0], [2, 1]], [[-1, 1]]], 3)
    np.testing.assert_array_equal(outs[0], [[2], [22]])
    np.testing.assert_array_equal(outs[1], [[3]])


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_ranks=st.integers(1, 4),
    num_experts=st.integers(1, 9),
    num_topk=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(),
)
def test_each_expert_applied_by_hand(
    seed: int, num_ranks: int, num_experts: int, num_topk: int, dtype: np.dtype, weighted: bool
) -> None:
    """Expert e multiplies by e + 1; combine gives what a loop over tokens and slots gives, under any map."""
    rng = np.random.default_rng(seed)
    owner = rng.integers(0, num_ranks, num_experts)
    counts = rng.integers(0, 6, num_ranks)
    xs = [rng.standard_normal((n, 7)).astype(dtype) for n in counts]
    idxs = [rng.integers(-1, num_experts, (n, num_topk)) for n in counts]
    weights = [rng.random((n, num_topk)).astype(np.float32) for n in counts]

    received = reference.dispatch(xs, idxs, num_experts, expert_map=owner)
    ys = []
    for rank, got in enumerate(received):
        experts = np.repeat(np.flatnonzero(owner == rank), got.num_recv_tokens_per_expert)
        order = list(zip(experts, got.src_rank, got.src_token, got.src_slot, strict=True))
        assert order == sorted(order)
        for e, source, token, slot in order:
            assert idxs[source][token, slot] == e
        ys.append((got.recv_x.astype(np.float32) * (experts + 1)[:, None].astype(np.float32)).astype(dtype))
    assert sum(len(y) for y in ys) == sum(np.count_nonzero(idx >= 0) for idx in idxs)

    outs = reference.combine(ys, idxs, num_experts, weights if weighted else None, expert_map=owner)
    for source in range(num_ranks):
        for token in range(counts[source]):
            total = np.zeros(7, np.float32)
            for slot in range(num_topk):
                e = idxs[source][token, slot]
                if e >= 0:
                    y = (xs[source][token].astype(np.float32) * np.float32(e + 1)).astype(dtype)
                    y = y.astype(np.float32)
                    total = total + (weights[source][token, slot] * y if weighted else y)
            np.testing.assert_array_equal(outs[source][token], total.astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_dispatch_is_quantise_of_each_token(dtype: np.dtype) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, 33)).astype(dtype)
    idx = rng.integers(0, 4, (6, 2))
    (whole,) = reference.dispatch([x], [idx], 4, quant="int8")
    (raw,) = reference.dispatch([x], [idx], 4, quant="int8", dequantize=False)
    q, scales = reference.quantize(x)
    np.testing.assert_array_equal(raw.recv_x, q[raw.src_token])
    np.testing.assert_array_equal(raw.scales, scales[raw.src_token])
    np.testing.assert_array_equal(whole.recv_x, reference.dequantize(q, scales, dtype)[whole.src_token])
    assert whole.scales is None


def test_nothing_at_all() -> None:
    empty = np.zeros((0, 4), np.float32)
    received = reference.dispatch([empty, empty], [np.zeros((0, 2), int)] * 2, 1)
    assert [r.recv_x.shape for r in received] == [(0, 4), (0, 4)]
    assert [len(r.num_recv_tokens_per_expert) for r in received] == [1, 0]
    outs = reference.combine([r.recv_x for r in received], [np.zeros((0, 2), int)] * 2, 1)
    assert [out.shape for out in outs] == [(0, 4), (0, 4)]
