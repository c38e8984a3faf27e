"""Measures an operation over its sizes. Knows operations only by their records."""

from __future__ import annotations

import sys

import numpy as np

from xccl.bench.floors import Floors
from xccl.bench.libraries import LIBRARIES
from xccl.bench.machine import Machine, place
from xccl.bench.operation import Case, Context, Operation
from xccl.bench.operations import OPERATIONS
from xccl.bench.row import Row, Times, header
from xccl.bench.settings import Settings
from xccl.bench.timing import Block, calibrate, calls_block, interleave, prepared_block, summary
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
        raise XcclUsageError(f"bench: {library.label} has no {operation.name}; --vs {versus} is for {able}")
    library.require()
    if dtype not in twin.dtypes:
        raise XcclUsageError(
            f"bench: {library.label} cannot do {operation.name} of {dtype}: --dtype is one of {', '.join(twin.dtypes)}"
        )


def run(comm: Communicator, settings: Settings) -> tuple[Machine, list[Row]]:
    """Measures and, on rank 0, prints each row as soon as it is there. Collective; the same rows on all ranks."""
    operation, dtype = find(settings, comm.size)
    library = None if settings.versus is None else LIBRARIES[settings.versus](comm)
    machine = place(comm, settings.pin, library)
    floors = Floors(comm, settings.buffers)
    _say(comm, header(operation, settings, machine, floors))
    rows = []
    context = Context(comm, settings, dtype, library)
    for count in operation.counts(settings, context.dtype.itemsize, comm.size):
        row = measure(context, operation, dtype, count, floors)
        _say(comm, [] if row.note is None else [f"# {row.note}"])
        _say(comm, [row.text()])
        rows.append(row)
    if library is not None:
        library.close()
    wrong = sum(row.wrong for row in rows)
    if wrong:
        _say(comm, [f"# {wrong} wrong elements: the times of those rows mean nothing"])
    return machine, rows


def measure(context: Context, operation: Operation, dtype: str, count: int, floors: Floors) -> Row:
    """One row. Collective."""
    comm, settings = context.comm, context.settings
    classes = [operation.case] + ([] if settings.versus is None else [operation.versus[settings.versus].case])
    cases = [case(context, count) for case in classes]
    for case in cases:
        case.settle()
    blocks = [_block(case) for case in cases]
    for block in blocks:
        comm.barrier()
        block(settings.warmup)
    repeats = [settings.iterations or calibrate(comm, block) for block in blocks]
    for case in cases:
        case.poison()
    taken = interleave(comm, blocks, repeats, settings.blocks)
    comm.barrier()
    wrong = comm.all_reduce(np.array([case.wrong(n) for case, n in zip(cases, repeats, strict=True)], np.int64))
    times = [
        Times(**summary(each, case.calls), wrong=int(bad)) for each, case, bad in zip(taken, cases, wrong, strict=True)
    ]
    factor = operation.factor(comm.size)
    size, note = cases[0].nbytes, cases[0].note()
    for case in cases:
        case.close()
    context.free()
    floor = floors.floor_us(size * factor)
    theirs = times[1] if len(times) > 1 else None
    return Row(operation.name, size, count, dtype, factor, floor, times[0], theirs, note)


def _block(case: Case) -> Block:
    if type(case).before is Case.before:
        block = calls_block(case.run)
    else:
        block = prepared_block(case.comm, case.before, case.run)

    def settled(repeats: int) -> float:
        seconds = block(repeats)
        case.settle()
        return seconds

    return settled


def _say(comm: Communicator, lines: list[str]) -> None:
    if comm.rank == 0 and lines:
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
