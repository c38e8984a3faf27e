"""Sizes and limits of a run."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import xccl
from xccl.bench.operation import divisible_elements, elements
from xccl.bench.settings import Settings, parse_size


@pytest.mark.parametrize(("text", "size"), [("8", 8), ("64K", 65536), ("8M", 8 << 20), ("1g", 1 << 30), (" 2k ", 2048)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "1.5M", "-8", "8MB", "eight"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a size is a number of bytes"):
        parse_size(text)


@given(st.integers(1, 1000), st.integers(0, 10**6), st.integers(2, 9))
def test_sizes_grow_by_the_factor_up_to_the_end(begin: int, more: int, factor: int) -> None:
    sizes = Settings("send", begin=begin, end=begin + more, factor=factor).sizes()
    assert sizes[0] == begin
    assert all(after == before * factor for before, after in itertools.pairwise(sizes))
    assert sizes[-1] <= begin + more < sizes[-1] * factor


@given(st.integers(1, 100), st.sampled_from([1, 2, 4, 8]), st.integers(1, 64))
def test_counts_are_whole_elements_and_no_size_comes_twice(begin: int, itemsize: int, ranks: int) -> None:
    settings = Settings("send", begin=begin, end=begin * 64, factor=2)
    for function, unit in ((elements, 1), (divisible_elements, ranks)):
        counts = function(settings, itemsize, ranks)
        assert counts[0] >= unit
        assert all(count % unit == 0 for count in counts)
        assert counts == sorted(set(counts))
        assert counts[-1] * itemsize <= max(settings.end, unit * itemsize)


@pytest.mark.parametrize(
    "wrong",
    [
        {"begin": 0},
        {"factor": 1},
        {"warmup": -1},
        {"iterations": 0},
        {"blocks": 0},
        {"buffers": 0},
        {"begin": 16, "end": 8},
        {"tokens": (0,)},
        {"tokens": ()},
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(xccl.XcclUsageError, match=r"at least|smaller"):
        Settings("send", **wrong)  # type: ignore[arg-type]
