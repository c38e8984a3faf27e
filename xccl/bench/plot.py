"""Draws the rows of a run: time and bus bandwidth against size."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from xccl.bench.machine import Machine
from xccl.bench.row import Row
from xccl.errors import XcclUsageError


def require() -> None:
    """Raises XcclUsageError if matplotlib is missing: before the run, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise XcclUsageError("bench: --plot needs matplotlib: pip install 'xccl[bench]'")


def draw(path: Path, machine: Machine, rows: list[Row], label: str | None = None) -> None:
    """Writes the figure; its suffix says the format. `label` is the library that was compared with."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time, bandwidth) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    sizes = [row.size for row in rows]
    time.plot(sizes, [row.ours.p50 for row in rows], "o-", label="xccl")
    time.plot(sizes, [row.floor_us for row in rows], ":", color="gray", label="floor")
    bandwidth.plot(sizes, [row.busbw for row in rows], "o-", label="xccl")
    theirs = [(row, row.theirs) for row in rows if row.theirs is not None]
    if theirs:
        time.plot(sizes, [other.p50 for _, other in theirs], "s--", label=label)
        bandwidth.plot(sizes, [row.busbw * row.ours.p50 / other.p50 for row, other in theirs], "s--", label=label)
    time.set(xscale="log", yscale="log", xlabel="size (bytes)", ylabel="time, median (µs)")
    bandwidth.set(xscale="log", xlabel="size (bytes)", ylabel="bus bandwidth (GB/s)")
    for axes in (time, bandwidth):
        axes.grid(True, alpha=0.3)
        axes.legend()
    figure.suptitle(f"{rows[0].operation}, {rows[0].dtype}, {machine.ranks} ranks on {len(machine.cores)} cores")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
