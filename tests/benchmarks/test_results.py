"""Ratios follow from times of the same run; the best MPI is chosen for each size; files keep everything."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.results import Results


def row(ours: float, theirs: float | None, floor: float = 0.5, size: int = 8) -> dict[str, Any]:
    """As in `xccl bench --json`."""
    return {
        "size": size,
        "floor_us": floor,
        "ours": {"p50": ours},
        "theirs": None if theirs is None else {"p50": theirs},
    }


def test_the_fastest_mpi_of_each_size_counts_with_the_time_beside_it() -> None:
    results = Results()
    for mpi, x, ours, theirs in (("a", 8, 2.0, 4.0), ("b", 8, 3.0, 5.0), ("a", 64, 6.0, 9.0), ("b", 64, 5.0, 8.0)):
        results.add("send", mpi, x, row(ours, theirs))
    best = results.best("send")
    assert {x: (point.mpi, point.ratio) for x, point in best.items()} == {8: ("a", 0.5), 64: ("b", 0.625)}


def test_a_ratio_is_the_median_of_ratios_and_not_a_ratio_of_medians() -> None:
    results = Results()
    for ours, theirs in ((1.0, 2.0), (10.0, 100.0), (4.0, 5.0)):
        results.add("send", "a", 8, row(ours, theirs, floor=ours / 4))
    point = results.best("send")[8]
    assert (point.ratio, point.time, point.mpi_time, point.of_floor) == (0.5, 4.0, 5.0, 0.25)


def test_places_are_in_order_and_rows_without_mpi_have_no_best() -> None:
    results = Results()
    for x in (64, 8, 512):
        results.add("growth", "alone", x, row(1.0, None))
    assert list(results.of("growth")) == [8, 64, 512]
    assert results.best("growth") == {}
    assert results.of("other") == {}


times = st.floats(0.01, 1e6)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([8, 64]), times, times), min_size=1))
def test_a_file_keeps_everything(rows: list[tuple[str, int, float, float]]) -> None:
    results = Results(about={"date": "2026-01-01"}, mpis={"a": "A 1"}, idle=[0.01])
    for mpi, x, ours, theirs in rows:
        results.add("send", mpi, x, row(ours, theirs))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deeper" / "results.json"
        results.save(path)
        assert Results.load(path) == results
