"""csrc/ae_layout.c: sizes are exact, 64 bits wide, and what is really taken (class 12)."""

from __future__ import annotations

import numpy as np
import pytest
from ae_support import random_roles
from hypothesis import given
from hypothesis import strategies as st
from moe_support import DTYPES, random_layer
from support import ranks
from test_moe_layout import LINE, PAGE, up

import xccl


def expected_bytes(attention: int, experts: int, num_experts: int, hidden: int, num_topk: int, max_tokens: int,
                   itemsize: int, int8: bool, direct: bool) -> np.ndarray:  # fmt: skip
    """The layout of ae.h with Python's unbounded integers."""
    hubs = attention if direct else min(attention, experts)
    slots = -(-attention // hubs)
    row = hidden * itemsize
    staged = up(hidden if int8 else row, LINE)
    choices = max_tokens * num_topk
    routing = up(up(experts * 16, LINE) + choices * 8 + experts * LINE, LINE)
    scales = up(routing + choices * 16, LINE)
    rows = up(scales + (max_tokens * 4 if int8 else 0), LINE)
    stage = up(rows + max_tokens * staged, PAGE)
    recv = attention * choices * row
    outputs = up(up(attention * -(-num_experts // experts) * 8, LINE) + recv, PAGE)
    result = 0 if direct else up(max_tokens * row, PAGE)
    lines = attention + experts + hubs + (0 if direct else slots + 1)
    return np.array([2 * lines * LINE, 2 * (slots * stage + outputs + result), up(2 * recv, PAGE)], object)


@given(
    attention=st.integers(1, 500),
    experts=st.integers(1, 500),
    num_experts=st.integers(1, 3000),
    hidden=st.one_of(st.integers(1, 8192), st.integers(1, 1 << 50)),
    num_topk=st.integers(1, 64),
    max_tokens=st.one_of(st.integers(0, 300), st.integers(0, 1 << 25)),
    dtype=st.sampled_from(DTYPES),
    quant=st.sampled_from([None, "int8"]),
    path=st.sampled_from(["direct", "trampoline"]),
)
def test_sizes_are_those_of_unbounded_arithmetic(
    attention: int, experts: int, num_experts: int, hidden: int, num_topk: int, max_tokens: int, dtype: np.dtype,
    quant: str | None, path: str,
) -> None:  # fmt: skip
    expected = expected_bytes(
        attention, experts, num_experts, hidden, num_topk, max_tokens, dtype.itemsize, quant is not None,
        path == "direct",
    )  # fmt: skip

    def actual() -> xccl.BufferBytes:
        return xccl.AttentionExpert.buffer_bytes(
            range(attention), range(attention, attention + experts), num_experts, hidden, num_topk, max_tokens, dtype,
            quant, path=path,
        )  # fmt: skip

    if max(expected) < 1 << 62:
        assert actual() == tuple(expected)
    else:
        with pytest.raises(xccl.XcclUsageError, match="62 bits"):
            actual()


@ranks(6)
def test_the_planner_and_the_allocator_agree(comm: xccl.Communicator) -> None:
    from xccl._binding import lib

    def used(area: int) -> int:
        return int(lib.xccl_heap_used(comm._world._w, area))

    rng = np.random.default_rng(1)
    for turn in range(8):
        roles = random_roles(rng, comm.size, 3, 2, int(rng.integers(1, 4)))
        layer = random_layer(rng, 2)
        path = ["direct", "trampoline"][turn % 2]
        before = [used(area) for area in (0, 1)]
        ranks_of = None if layer.expert_map is None else np.array(roles.expert_ranks)[layer.expert_map]
        plan = xccl.AttentionExpert.buffer_bytes(
            roles.domains, roles.expert_ranks, layer.num_experts, layer.hidden, layer.num_topk, layer.max_tokens,
            layer.dtype, layer.quant, ranks_of, path=path,
        )  # fmt: skip
        with roles.open(comm, layer, path):
            assert used(0) - before[0] == plan.metadata
            assert used(1) - before[1] == plan.staging + plan.pool
