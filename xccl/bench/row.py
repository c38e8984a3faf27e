"""A row of the table, and the header above the rows."""

from __future__ import annotations

from dataclasses import dataclass

from xccl.bench.floors import Floors
from xccl.bench.libraries import LIBRARIES
from xccl.bench.machine import Machine
from xccl.bench.operation import Operation
from xccl.bench.settings import Settings


@dataclass(frozen=True)
class Times:
    """Times of one library in microseconds, and wrong elements on all ranks."""

    min: float
    p50: float
    p99: float
    wrong: int


@dataclass(frozen=True)
class Row:
    """One measured size.

    Attributes
    ----------
    factor : float
        Bus bandwidth / algorithm bandwidth.
    floor_us : float
        Least time of the operation on this machine.
    ours, theirs : Times
        theirs is None without --vs.
    """

    operation: str
    size: int
    count: int
    dtype: str
    factor: float
    floor_us: float
    ours: Times
    theirs: Times | None = None
    note: str | None = None

    @property
    def algbw(self) -> float:
        """GB/s: size / p50."""
        return self.size / self.ours.p50 / 1e3

    @property
    def busbw(self) -> float:
        """GB/s that do not depend on the number of ranks for a perfect algorithm."""
        return self.algbw * self.factor

    @property
    def ratio(self) -> float | None:
        """p50 / p50 of the other library: below 1 is faster than it."""
        return None if self.theirs is None else self.ours.p50 / self.theirs.p50

    @property
    def wrong(self) -> int:
        """Wrong elements of both libraries."""
        return self.ours.wrong + (0 if self.theirs is None else self.theirs.wrong)

    def text(self) -> str:
        """The row as it is printed, below `titles`."""
        over_floor = f"{self.ours.p50 / self.floor_us:9.1f}" if self.floor_us > 0 else f"{'-':>9}"
        text = (
            f"{self.size:>12} {self.count:>11} {self.dtype:>9}"
            f" {_us(self.ours.min)} {_us(self.ours.p50)} {_us(self.ours.p99)}"
            f" {self.algbw:8.2f} {self.busbw:8.2f} {_us(self.floor_us)} {over_floor} {self.ours.wrong:>7}"
        )
        if self.theirs is not None:
            theirs = self.theirs
            text += f" {_us(theirs.min)} {_us(theirs.p50)} {_us(theirs.p99)} {self.ratio:7.2f} {theirs.wrong:>7}"
        return text


def titles(label: str | None) -> list[str]:
    """Two lines above the rows, with columns of the library that is called `label`."""
    units = (
        f"#{'(B)':>11} {'':>11} {'':>9} {'(us)':>9} {'(us)':>9} {'(us)':>9} {'(GB/s)':>8} {'(GB/s)':>8} {'(us)':>9} "
    )
    names = (
        f"#{'size':>11} {'count':>11} {'type':>9} {'min':>9} {'p50':>9} {'p99':>9} {'algbw':>8} {'busbw':>8}"
        f" {'floor':>9} {'p50/floor':>9} {'#wrong':>7}"
    )
    if label is not None:
        units += f"{'':>9} {'':>7} {'(us)':>9} {'(us)':>9} {'(us)':>9}"
        names += "".join(f" {label + ' ' + name:>9}" for name in ("min", "p50", "p99")) + f" {'ratio':>7} {'#wrong':>7}"
    return [names, units.rstrip()]


def header(operation: Operation, settings: Settings, machine: Machine, floors: Floors) -> list[str]:
    """What one has to know to read the rows."""
    pinned = f"pinned to cores {' '.join(map(str, machine.pinned))}" if machine.pinned else "not pinned"
    line = "-" if floors.line_us is None else f"{floors.line_us:.3f} us"
    arrays = "symmetric" if settings.symmetric else "ordinary"
    calls = ", calls made by comm.prepare" if settings.prepared else ""
    lines = [
        f"# {operation.name}: {machine.versions}",
        f"# host: {machine.host}, {len(machine.cores)} cores",
        f"# ranks: {machine.ranks}, {pinned}, {'' if machine.oversubscribed else 'not '}oversubscribed",
        f"# arrays: {arrays}, {settings.buffers} sets in turn{calls}",
        f"# size: {operation.size}",
        f"# time: of the slowest rank, mean of a block; min, median and p99 of {settings.blocks} blocks",
        f"# bandwidth: algbw = size / p50, busbw = algbw * {operation.factor(machine.ranks):.3g}",
        f"# floor: {line} for a cache line from core to core, plus busbw's bytes at the speed of memcpy on all ranks",
    ]
    if settings.versus is None:
        return lines + titles(None)
    label, does = LIBRARIES[settings.versus].label, operation.versus[settings.versus].does
    lines.append(f"# ratio: p50 / p50 of {label}, blocks in turn; {label} calls {does}, ordinary arrays")
    return lines + titles(label)


def _us(value: float) -> str:
    return f"{value:9.3f}" if value < 1000 else f"{value:9.1f}"
