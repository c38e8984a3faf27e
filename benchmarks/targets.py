"""Measures xccl's Python API against mpi4py over Open MPI, MPICH and Intel MPI, and says which targets are met.

    python -m benchmarks.targets            # or: make targets

Each MPI has a virtual environment of its own (.venv-<name>, wheels from PyPI), made if it is not there. xccl and MPI
run in the same processes, in turns; every result is checked. A ratio is xccl's time / that of the MPI that is fastest
at that size; both times are of the same run. Medians over blocks, then over repetitions of the whole.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import campaign
from benchmarks.plan import EVERY, GROWTH, IDLE, SERIES, TARGETS, Series, Target
from benchmarks.results import Point, Results

PUBLISHED = campaign.ROOT / "benchmarks" / "results" / "targets.json"


@dataclass(frozen=True)
class Verdict:
    """A target and what was reached.

    Attributes
    ----------
    best : str
        Which MPIs were the fastest, and at how many sizes.
    """

    target: Target
    reached: float
    best: str
    worst: Point | None = None

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.target.met(self.reached)


def judge(target: Target, results: Results) -> Verdict | None:
    """What the results say of a target; None if it was not measured."""
    if target is IDLE:
        return Verdict(target, statistics.median(results.idle), "") if results.idle else None
    low, high = target.x or (0, sys.maxsize)
    points = [point for x, point in results.best(target.series).items() if low <= x <= high]
    if not points:
        return None
    if target.judged == "floor":
        return Verdict(target, min(point.of_floor for point in points), "")
    fastest = Counter(campaign.LABELS[point.mpi] for point in points)
    best = ", ".join(f"{name} {count}" if len(points) > 1 else name for name, count in fastest.most_common())
    worst = max(points, key=lambda point: point.ratio)
    if target.judged == "geomean":
        return Verdict(target, statistics.geometric_mean(point.ratio for point in points), best, worst)
    return Verdict(target, worst.ratio, best, worst)


def summary(results: Results) -> Table:
    """The table of targets."""
    table = Table(title="Targets: time of xccl / time of the fastest MPI", title_justify="left")
    for name, side in (("row", "left"), ("target", "right"), ("reached", "right"), ("met", "left"), ("name", "left")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    table.add_column("fastest MPI (sizes)")
    table.add_column("worst size: µs, ratio")
    for target in TARGETS:
        verdict = judge(target, results)
        if verdict is None:
            continue
        met = "[green]yes[/]" if verdict.met else "[red]no[/]"
        worst = "" if verdict.worst is None else _worst(verdict.worst)
        table.add_row(target.row, target.goal, reached_text(verdict), met, target.name, verdict.best, worst)
    return table


def reached_text(verdict: Verdict) -> str:
    """As it is printed."""
    return f"{100 * verdict.reached:.2f} %" if verdict.target is IDLE else f"{verdict.reached:.2f}"


def _worst(point: Point) -> str:
    return f"{point.x} {EVERY[point.series].unit}: {point.time:.4g} / {point.mpi_time:.4g} = {point.ratio:.3f}"


def details(results: Results) -> Table:
    """Every size: xccl's time and each MPI's, and the ratio to the fastest one."""
    table = Table(title="Medians, µs", title_justify="left")
    for name in ("series", "size", "xccl", *results.mpis.values(), "ratio", "floor / xccl"):
        table.add_column(name, justify="left" if name == "series" else "right")
    for name, series in EVERY.items():
        best = results.best(name)
        for x, points in results.of(name).items():
            theirs = {point.mpi: f"{point.mpi_time:.4g}" for point in points if point.theirs}
            shown = best.get(x, points[0])
            ratio = f"{shown.ratio:.3f}" if shown.theirs else ""
            columns = [theirs.get(mpi, "") for mpi in results.mpis]
            size = "" if series.settings.operation == "barrier" else f"{x} {series.unit}"
            table.add_row(name, size, f"{shown.time:.4g}", *columns, ratio, f"{shown.of_floor:.2f}")
        table.add_section()
    return table


def measure(series: list[Series], repeats: int, blocks: int, *, short: bool, idle: bool, console: Console) -> Results:
    """Everything, `repeats` times."""
    results = Results()
    campaign.describe(results, repeats, blocks)
    mpis = campaign.environments(console.print)
    jobs = list(campaign.jobs(series, mpis)) * repeats
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(jobs))
        for job in jobs:
            progress.update(task, description=f"{job.ranks} ranks, {job.mpi}")
            campaign.collect(results, job, campaign.run(job, mpis, blocks, short=short))
            progress.advance(task)
        for _ in range(repeats if idle else 0):
            campaign.wait_idle(results)
    return results


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="once, first and last size of each series")
    parser.add_argument("--only", action="append", choices=[t.name for t in TARGETS], metavar="ROW", help="a target")
    parser.add_argument("--growth", action="store_true", help="also how time grows with ranks, for the report")
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="of the whole (2)")
    parser.add_argument("--blocks", type=int, default=8, metavar="B", help="that are timed in each (8)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="what to write; without --quick and --only the published results"
    )
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing, print what a file holds")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 180)
    if options.show is not None:
        results = Results.load(options.show)
    else:
        names = {target.series for target in TARGETS if options.only is None or target.name in options.only}
        series = [each for name, each in SERIES.items() if options.only is None or name in names]
        series += GROWTH.values() if options.growth else []
        repeats = 1 if options.quick else options.repeats
        idle = IDLE.series in names
        results = measure(series, repeats, options.blocks, short=options.quick, idle=idle, console=console)
        partial = options.quick or options.only is not None
        if options.json is not None or not partial:
            results.save(options.json or PUBLISHED)
    console.print(details(results))
    console.print(summary(results))


if __name__ == "__main__":
    main()
