"""Measures one size of an operation, in turn with another library."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xccl.bench.operation import Case, Context, Operation
from xccl.bench.timing import Block, Times, calibrate, calls_block, interleave, prepared_block


@dataclass(frozen=True)
class Sample:
    """What came out. With --vs there are two sides: xccl, then the other library.

    Attributes
    ----------
    size : int
        In bytes.
    note : str or None
        What the reader of the row must know.
    times : list of arrays
        Microseconds of one operation on the slowest rank, for each side and block.
    wrong : list of int
        Wrong elements on all ranks, for each side.
    """

    size: int
    note: str | None
    times: list[Times]
    wrong: list[int]


def take(context: Context, operation: Operation, count: int) -> Sample:
    """Warms up, finds the length of a block, spoils what is to arrive, measures, and checks. Collective."""
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
    times = [each / case.calls for each, case in zip(taken, cases, strict=True)]
    sample = Sample(cases[0].nbytes, cases[0].note(), times, [int(number) for number in wrong])
    for case in cases:
        case.close()
    context.free()
    return sample


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
