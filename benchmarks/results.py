"""What was measured, as it is kept in JSON files, and the ratios that follow from it."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ALONE = "alone"  # in place of an MPI


@dataclass
class Point:
    """One size of a series beside one MPI. Lists have a number for each repetition.

    Attributes
    ----------
    x : int
        Where it stands in its series: see Series.x.
    ours, theirs : list of float
        Medians in microseconds; theirs is empty without MPI.
    floor : list of float
        Least time on this machine, measured in the same process.
    """

    series: str
    mpi: str
    x: int
    size: int
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)

    @property
    def time(self) -> float:
        """Median of xccl's times."""
        return statistics.median(self.ours)

    @property
    def mpi_time(self) -> float:
        """Median of MPI's times."""
        return statistics.median(self.theirs)

    @property
    def ratio(self) -> float:
        """Median of the ratios, each of times from the same processes."""
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    @property
    def of_floor(self) -> float:
        """Median part of the floor in xccl's time."""
        return statistics.median(a / b for a, b in zip(self.floor, self.ours, strict=True))


@dataclass
class Results:
    """Everything that one command measured.

    Attributes
    ----------
    about : dict
        Machine, versions, date, number of repetitions and blocks.
    mpis : dict
        Names of the MPIs by the names of their environments.
    idle : list of float
        CPU seconds of 8 ranks that waited one second.
    """

    about: dict[str, Any] = field(default_factory=dict)
    mpis: dict[str, str] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)

    def add(self, series: str, mpi: str, x: int, row: dict[str, Any]) -> None:
        """Adds one repetition: a row of `xccl bench --json`."""
        point = next((p for p in self.points if (p.series, p.mpi, p.x) == (series, mpi, x)), None)
        if point is None:
            point = Point(series, mpi, x, row["size"])
            self.points.append(point)
        point.ours.append(_rounded(row["ours"]["p50"]))
        point.floor.append(_rounded(row["floor_us"]))
        if row["theirs"] is not None:
            point.theirs.append(_rounded(row["theirs"]["p50"]))

    def of(self, series: str) -> dict[int, list[Point]]:
        """Points of a series: those of all MPIs for each x, in order."""
        found: dict[int, list[Point]] = {}
        for point in sorted((p for p in self.points if p.series == series), key=lambda p: p.x):
            found.setdefault(point.x, []).append(point)
        return found

    def best(self, series: str) -> dict[int, Point]:
        """For each x the point beside the MPI that was fastest there."""
        return {
            x: min(points, key=lambda point: point.mpi_time)
            for x, points in self.of(series).items()
            if all(point.theirs for point in points)
        }

    def save(self, path: Path) -> None:
        """Writes a file with a line for each point."""
        content = asdict(self)
        points = ",\n  ".join(json.dumps(point) for point in content.pop("points"))
        head = json.dumps(content, indent=1).removesuffix("\n}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{head},\n "points": [\n  {points}\n ]\n}}\n')

    @staticmethod
    def load(path: Path) -> Results:
        """Reads what `save` wrote."""
        content = json.loads(path.read_text())
        return Results(**content | {"points": [Point(**point) for point in content["points"]]})


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
