"""A row's figures follow from its times."""

from __future__ import annotations

import numpy as np
import pytest

from xccl.bench.row import Row, Times, titles
from xccl.bench.timing import summary


def _row(theirs: Times | None = None) -> Row:
    return Row("all_to_all", 8_000_000, 2_000_000, "float32", 0.75, 500.0, Times(900.0, 1000.0, 1200.0, 3), theirs)


def test_bandwidths_are_size_over_the_median_time() -> None:
    assert _row().algbw == pytest.approx(8.0)
    assert _row().busbw == pytest.approx(6.0)


def test_the_ratio_is_below_one_if_the_other_library_takes_longer() -> None:
    row = _row(Times(1500.0, 2000.0, 2500.0, 4))
    assert row.ratio == pytest.approx(0.5)
    assert row.wrong == 7
    assert _row().ratio is None


def test_every_value_stands_below_its_title() -> None:
    for row in (_row(), _row(Times(1500.0, 2000.0, 2500.0, 4))):
        names, _ = titles(None if row.theirs is None else "MPI")
        assert len(row.text()) == len(names)
        assert len(row.text().split()) == len(names.replace("# ", " ").replace("MPI ", "MPI-").split())


def test_a_row_has_the_least_the_median_and_the_longest_of_few_times() -> None:
    assert summary(np.array([4.0, 2.0, 6.0, 8.0, 100.0])) == {"min": 2.0, "p50": 6.0, "p99": 100.0}
