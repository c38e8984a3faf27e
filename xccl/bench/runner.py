"""Measures an operation over its sizes. Knows operations only by their records."""

from __future__ import annotations

import sys

from xccl.bench.floors import Floors
from xccl.bench.libraries import LIBRARIES
from xccl.bench.machine import Machine, place
from xccl.bench.operation import Context, Operation
from xccl.bench.operations import OPERATIONS
from xccl.bench.row import Row, Times, header
from xccl.bench.sample import take
from xccl.bench.settings import Settings
from xccl.bench.timing import summary
from xccl.communicator import Communicator
from xccl.errors import XcclUsageError


def find(settings: Settings, ranks: int) -> tuple[Operation, str]:
    """The operation and its dtype. Raises XcclUsageError if it cannot be measured so."""
    operation = OPERATIONS.get(settings.operation)
    if operation is None:
        raise XcclUsageError(f"bench: operations are {', '.join(OPERATIONS)}; got {settings.operation!r}")
    if ranks < operation.min_ranks:
        raise XcclUsageError(
            f"bench: {operation.name} needs at least {operation.min_ranks} ranks, got {ranks}: give -n"
        )
    dtype = settings.dtype or operation.default_dtype
    if dtype not in operation.dtypes:
        raise XcclUsageError(f"bench: --dtype of {operation.name} is one of {', '.join(operation.dtypes)}, got {dtype}")
    if settings.prepared and not operation.can_prepare:
        able = ", ".join(each.name for each in OPERATIONS.values() if each.can_prepare)
        raise XcclUsageError(f"bench: --prepared is for {able}; got {operation.name}")
    if settings.versus is not None:
        _check_versus(operation, dtype, settings.versus)
    return operation, dtype


def _check_versus(operation: Operation, dtype: str, versus: str) -> None:
    twin, library = operation.versus.get(versus), LIBRARIES[versus]
    if twin is None:
        able = ", ".join(each.name for each in OPERATIONS.values() if versus in each.versus)
        raise XcclUsageError(f"bench: {versus} has no {operation.name}; --vs {versus} is for {able}")
    library.require()
    if dtype not in twin.dtypes:
        raise XcclUsageError(
            f"bench: {library.label} cannot do {operation.name} of {dtype}: --dtype is one of {', '.join(twin.dtypes)}"
        )


def run(comm: Communicator, settings: Settings, *, silent: bool = False) -> tuple[Machine, list[Row]]:
    """Measures and, unless `silent`, prints each row on rank 0 as soon as it is there.

    Collective; the same rows on all ranks.
    """
    say = _nothing if silent or comm.rank != 0 else _write
    operation, dtype = find(settings, comm.size)
    library = None if settings.versus is None else LIBRARIES[settings.versus](comm)
    machine = place(comm, settings.pin, library)
    floors = Floors(comm, settings.buffers)
    say(header(operation, settings, machine, floors))
    rows = []
    context = Context(comm, settings, dtype, library)
    for count in operation.counts(settings, context.dtype.itemsize, comm.size):
        row = measure(context, operation, dtype, count, floors)
        say([row.text()] if row.note is None else [f"# {row.note}", row.text()])
        rows.append(row)
    if library is not None:
        library.close()
    wrong = sum(row.wrong for row in rows)
    if wrong:
        say([f"# {wrong} wrong elements: the times of those rows mean nothing"])
    return machine, rows


def measure(context: Context, operation: Operation, dtype: str, count: int, floors: Floors) -> Row:
    """One row. Collective."""
    sample = take(context, operation, count)
    sides = [Times(**summary(times), wrong=wrong) for times, wrong in zip(sample.times, sample.wrong, strict=True)]
    factor = operation.factor(context.comm.size)
    floor = floors.floor_us(sample.size * factor)
    theirs = sides[1] if len(sides) > 1 else None
    return Row(operation.name, sample.size, count, dtype, factor, floor, sides[0], theirs, sample.note)


def _write(lines: list[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _nothing(lines: list[str]) -> None:
    """For ranks that print nothing."""
