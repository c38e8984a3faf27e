"""Patterns, counts of wrong elements, bandwidth factors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xccl.bench.operation import count_wrong, pattern, pattern_sum
from xccl.bench.operations import OPERATIONS
from xccl.bench.operations.all_to_all_v import uneven_counts
from xccl.bench.settings import DTYPES


@pytest.mark.parametrize(
    ("names", "factors"),
    [
        (("all_reduce",), {1: 0, 2: 1, 4: 1.5, 8: 1.75}),
        (("all_gather", "reduce_scatter", "all_to_all"), {1: 0, 2: 0.5, 4: 0.75, 8: 0.875}),
        (("put", "get", "put_signal", "send", "bandwidth", "broadcast", "all_to_all_v"), {1: 1, 2: 1, 8: 1}),
        (("dispatch", "combine", "moe", "barrier"), {1: 1, 2: 1, 8: 1}),
    ],
)
def test_bandwidth_factors_are_those_of_nccl_tests(names: tuple[str, ...], factors: dict[int, float]) -> None:
    for name in names:
        for ranks, factor in factors.items():
            assert OPERATIONS[name].factor(ranks) == factor


def test_every_operation_says_what_its_size_means() -> None:
    for name, operation in OPERATIONS.items():
        assert name == operation.name
        assert operation.size
        assert all(versus.case.is_twin and versus.does for versus in operation.versus.values())
        assert not operation.case.is_twin
        assert operation.default_dtype in operation.dtypes


@given(st.integers(0, 63), st.integers(0, 7), st.integers(0, 100), st.integers(1, 200), st.sampled_from(list(DTYPES)))
def test_a_pattern_can_begin_anywhere(rank: int, buffer: int, start: int, count: int, name: str) -> None:
    dtype = np.dtype(DTYPES[name])
    whole = pattern(rank, buffer, start + count, dtype)
    assert whole.dtype == dtype
    assert whole[start:].tobytes() == pattern(rank, buffer, count, dtype, start).tobytes()
    assert whole.astype(np.float64).min() >= 1
    assert whole.astype(np.float64).max() <= 64


def test_patterns_of_ranks_and_buffers_differ() -> None:
    patterns = {pattern(rank, buffer, 64, np.dtype(np.int8)).tobytes() for rank in range(16) for buffer in range(4)}
    assert len(patterns) == 64


def test_a_sum_of_patterns_is_rounded_once() -> None:
    exact = sum(pattern(rank, 1, 100, np.dtype(np.float64)) for rank in range(16))
    for name in ("bfloat16", "float16", "float32"):
        dtype = np.dtype(DTYPES[name])
        assert pattern_sum(16, 1, 100, dtype).tobytes() == exact.astype(dtype).tobytes()


@given(st.sampled_from(list(DTYPES)), st.integers(1, 50), st.sets(st.integers(0, 49)))
def test_wrong_elements_are_counted(name: str, count: int, positions: set[int]) -> None:
    expected = pattern(0, 0, count, np.dtype(DTYPES[name]))
    out = expected.copy()
    changed = [position for position in positions if position < count]
    out.view(np.uint8).reshape(count, -1)[changed, 0] ^= 0x80
    assert count_wrong(out, expected) == len(changed)


def test_a_result_of_another_length_is_all_wrong() -> None:
    assert count_wrong(np.zeros(3), np.zeros(5)) == 5


@given(st.integers(0, 1000), st.integers(1, 16))
def test_uneven_parts_are_half_to_one_and_a_half_of_the_mean(count: int, ranks: int) -> None:
    counts = uneven_counts(count, ranks)
    assert counts.shape == (ranks, ranks)
    assert (counts >= count // (2 * ranks)).all()
    assert (counts <= 3 * count // (2 * ranks)).all()
