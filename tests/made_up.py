"""Results that nobody measured, for the tests of the programs in benchmarks/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.plan import EVERY
from benchmarks.results import ALONE, Results


def made_up(ours: Callable[[int], float] = lambda x: 1.0, floor: float = 0.25) -> Results:
    """MPI takes 2 µs everywhere, MPICH 3 µs; every place of every series is there."""
    about = {"host": "a machine", "cores": 2, "versions": "xccl 0", "date": "2026-01-01", "commit": "abc", "blocks": 8}
    results = Results(about | {"repeats": 1}, {"openmpi": "Open MPI 5", "mpich": "MPICH 5"}, [], [0.01])
    for name, series in EVERY.items():
        places = [size // (series.ranks if series.unit == "B a peer" else 1) for size in series.settings.sizes()]
        if series.unit == "tokens":
            places = list(series.settings.tokens)
        elif series.settings.operation == "barrier":
            places = [0]
        for x in places:
            for mpi, theirs in (("openmpi", 2.0), ("mpich", 3.0)) if series.settings.versus else ((ALONE, None),):
                row: dict[str, Any] = {"size": x, "floor_us": floor, "ours": {"p50": ours(x)}, "theirs": None}
                results.add(name, mpi, x, row | ({"theirs": {"p50": theirs}} if theirs else {}))
    return results
