"""A row of the table, and the header above the rows."""

from __future__ import annotations

from dataclasses import dataclass

from xccl.bench.floors import Floors
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
    ours, mpi : Times
        mpi is None without --vs mpi.
    """

    operation: str
    size: int
    count: int
    dtype: str
    factor: float
    floor_us: float
    ours: Times
    mpi: Times | None = None
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
        """p50 / p50 of MPI: below 1 is faster than MPI."""
        return None if self.mpi is None else self.ours.p50 / self.mpi.p50

    @property
    def wrong(self) -> int:
        """Wrong elements of both libraries."""
        return self.ours.wrong + (0 if self.mpi is None else self.mpi.wrong)

    def text(self) -> str:
        """The row as it is printed, below `titles`."""
        over_floor = f"{self.ours.p50 / self.floor_us:9.1f}" if self.floor_us > 0 else f"{'-':>9}"
        text = (
            f"{self.size:>12} {self.count:>11} {self.dtype:>9}"
            f" {_us(self.ours.min)} {_us(self.ours.p50)} {_us(self.ours.p99)}"
            f" {self.algbw:8.2f} {self.busbw:8.2f} {_us(self.floor_us)} {over_floor} {self.ours.wrong:>7}"
        )
        if self.mpi is not None:
            text += (
                f" {_us(self.mpi.min)} {_us(self.mpi.p50)} {_us(self.mpi.p99)} {self.ratio:7.2f} {self.mpi.wrong:>7}"
            )
        return text


def titles(versus: bool) -> list[str]:
    """Two lines above the rows."""
    units = (
        f"#{'(B)':>11} {'':>11} {'':>9} {'(us)':>9} {'(us)':>9} {'(us)':>9} {'(GB/s)':>8} {'(GB/s)':>8} {'(us)':>9} "
    )
    names = (
        f"#{'size':>11} {'count':>11} {'type':>9} {'min':>9} {'p50':>9} {'p99':>9} {'algbw':>8} {'busbw':>8}"
        f" {'floor':>9} {'p50/floor':>9} {'#wrong':>7}"
    )
    if versus:
        units += f"{'':>9} {'':>7} {'(us)':>9} {'(us)':>9} {'(us)':>9}"
        names += f" {'MPI min':>9} {'MPI p50':>9} {'MPI p99':>9} {'ratio':>7} {'#wrong':>7}"
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
    if settings.versus is not None:
        lines.append(f"# ratio: p50 / p50 of MPI, blocks in turn; MPI calls {operation.mpi_does}, ordinary arrays")
    return lines + titles(settings.versus is not None)


def _us(value: float) -> str:
    return f"{value:9.3f}" if value < 1000 else f"{value:9.1f}"
