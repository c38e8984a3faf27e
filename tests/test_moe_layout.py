"""csrc/moe_layout.c: sizes are exact, 64 bits wide, and what the group really takes (class 12)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_support import DTYPES, random_layer
from support import ranks

import xccl
from xccl.reference import default_expert_map

LINE, PAGE = 64, 4096


def up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def expected_bytes(num_ranks: int, num_experts: int, hidden: int, num_topk: int, max_tokens: int, itemsize: int,
                   int8: bool) -> tuple[int, int, int]:  # fmt: skip
    """The layout of moe.h with Python's unbounded integers."""
    row = hidden * itemsize
    staged = up(hidden if int8 else row, LINE)
    entries = max_tokens * num_topk
    scales = up(entries * 8 + num_ranks * LINE, LINE)
    rows = up(scales + (max_tokens * 4 if int8 else 0), LINE)
    dispatch = up(rows + max_tokens * staged, PAGE)
    local = -(-num_experts // num_ranks)
    recv = num_ranks * entries * row
    combine = up(up(num_ranks * local * 8, LINE) + recv, PAGE)
    return 8 * num_ranks * LINE, 2 * dispatch + 2 * combine, up(2 * recv, PAGE)


@given(
    num_ranks=st.integers(1, 4096),
    num_experts=st.integers(1, 5000),
    hidden=st.one_of(st.integers(1, 8192), st.integers(1, 1 << 50)),
    num_topk=st.integers(1, 64),
    max_tokens=st.one_of(st.integers(0, 300), st.integers(0, 1 << 25)),
    dtype=st.sampled_from(DTYPES),
    quant=st.sampled_from([None, "int8"]),
)
def test_sizes_are_those_of_unbounded_arithmetic(
    num_ranks: int, num_experts: int, hidden: int, num_topk: int, max_tokens: int, dtype: np.dtype, quant: str | None
) -> None:
    expected = expected_bytes(num_ranks, num_experts, hidden, num_topk, max_tokens, dtype.itemsize, quant is not None)

    def actual() -> xccl.BufferBytes:
        return xccl.ExpertParallel.buffer_bytes(num_ranks, num_experts, hidden, num_topk, max_tokens, dtype, quant)

    if max(expected) < 1 << 62:
        assert actual() == expected
        assert actual().total == sum(expected)
    else:
        with pytest.raises(xccl.XcclUsageError, match="62 bits"):
            actual()


def test_beyond_32_bits() -> None:
    """experts x tokens x hidden of a real prefill: a 32-bit product would wrap around to something small."""
    sizes = xccl.ExpertParallel.buffer_bytes(64, 256, 7168, 8, 8192, "bfloat16")
    assert sizes.pool == 2 * 64 * 8192 * 8 * 7168 * 2
    assert sizes.staging > 2 * 64 * 8192 * 8 * 7168 * 2


def test_more_ranks_than_are_possible() -> None:
    with pytest.raises(xccl.XcclUsageError, match="num_ranks is 5000, expected 1 to 4096"):
        xccl.ExpertParallel.buffer_bytes(5000, 1, 1, 1, 1)
    with pytest.raises(xccl.XcclUsageError, match="num_ranks is 0"):
        xccl.ExpertParallel.buffer_bytes(0, 1, 1, 1, 1)


@ranks(1, 3)
def test_the_planner_and_the_allocator_agree(comm: xccl.Communicator) -> None:
    from xccl._binding import lib

    def used(area: int) -> int:
        return int(lib.xccl_heap_used(comm._world._w, area))

    rng = np.random.default_rng(1)
    for _ in range(10):
        layer = random_layer(rng, comm.size)
        before = [used(area) for area in (0, 1)]
        plan = xccl.ExpertParallel.buffer_bytes(
            comm.size, layer.num_experts, layer.hidden, layer.num_topk, layer.max_tokens, layer.dtype, layer.quant,
            layer.expert_map,
        )  # fmt: skip
        with layer.open(comm):
            assert used(0) - before[0] == plan.metadata
            assert used(1) - before[1] == plan.staging + plan.pool


@given(st.integers(1, 300), st.integers(1, 20))
def test_uneven_maps_take_the_largest_share(num_experts: int, num_ranks: int) -> None:
    """All experts on one rank need the longest table of row starts."""

    def planned(expert_map: object) -> xccl.BufferBytes:
        return xccl.ExpertParallel.buffer_bytes(num_ranks, num_experts, 8, 2, 16, expert_map=expert_map)

    assert planned(default_expert_map(num_experts, num_ranks)) == planned(None)
    assert planned([num_ranks - 1] * num_experts).staging >= planned(None).staging
