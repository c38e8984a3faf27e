"""Blocks of calls, interleaved between libraries; the slowest rank's time counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xccl.communicator import Communicator

BLOCK_SECONDS = 0.01  # a block is long against the clock and short against the noise of a shared machine
Times = NDArray[np.float64]

Block = Callable[[int], float]  # runs so many calls, returns the seconds of all


def calls_block(call: Callable[[int], object]) -> Block:
    """Blocks of `call`, timed together: a clock read in between costs as much as a small call."""

    def block(repeats: int) -> float:
        start = time.perf_counter()
        for i in range(repeats):
            call(i)
        return time.perf_counter() - start

    return block


def prepared_block(comm: Communicator, before: Callable[[int], object], call: Callable[[int], object]) -> Block:
    """Blocks of `call`, each timed alone because `before` comes first, untimed; ranks begin together."""

    def block(repeats: int) -> float:
        total = 0.0
        for i in range(repeats):
            before(i)
            comm.barrier()
            start = time.perf_counter()
            call(i)
            total += time.perf_counter() - start
        return total

    return block


def slowest(comm: Communicator, seconds: Sequence[float] | Times) -> Times:
    """The largest of the ranks, for each number. Collective."""
    return np.asarray(comm.all_reduce(np.array(seconds, np.float64), "max"))


def calibrate(comm: Communicator, block: Block, seconds: float = BLOCK_SECONDS) -> int:
    """Calls that fill a block; the same on all ranks. Collective."""
    repeats = 1
    while True:
        comm.barrier()
        taken = float(slowest(comm, [block(repeats)])[0])
        if taken >= seconds / 10 or repeats >= 1 << 20:
            return max(1, round(repeats * seconds / max(taken, 1e-9)))
        repeats *= 4


def interleave(comm: Communicator, blocks: Sequence[Block], repeats: Sequence[int], rounds: int) -> list[Times]:
    """Runs the blocks of all sides in turn, `rounds` times each. Collective.

    Returns microseconds of a call on the slowest rank, for each side and round. The order within a round alternates:
    no side always follows the same one.
    """
    taken: list[list[float]] = [[] for _ in blocks]
    sides = list(range(len(blocks)))
    for _ in range(rounds):
        for side in sides:
            comm.barrier()
            taken[side].append(blocks[side](repeats[side]) / repeats[side] * 1e6)
        sides.reverse()
    return [slowest(comm, times) for times in taken]


def summary(times: Times) -> dict[str, Any]:
    """min, p50 and p99."""
    return {
        "min": float(times.min()),
        "p50": float(np.median(times)),
        "p99": float(np.percentile(times, 99, method="higher")),
    }
