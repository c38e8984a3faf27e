"""The operations of `xccl bench` as a suite for pytest-benchmark, which keeps, compares and plots what it gets.

    pytest benchmarks/ --benchmark-only [--ranks 8]

The ranks measure as `xccl bench` does: an operation ends when the slowest rank has ended it, which no clock of one
process sees. pytest-benchmark gets the blocks' times afterwards, by a clock that stands still between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import xccl
from xccl.bench import runner
from xccl.bench.machine import place
from xccl.bench.operation import Context
from xccl.bench.operations import OPERATIONS
from xccl.bench.sample import Sample, take
from xccl.bench.settings import Settings

SIZES, TOKENS = (8, 64 << 10, 4 << 20), (8, 128)
SECONDS = 120


class Clock:
    """Shows the time that was measured elsewhere."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def read(self) -> float:
        """The timer of pytest-benchmark."""
        return self.seconds

    def replay(self, times: list[float]) -> Callable[[], None]:
        """A function whose calls take these seconds, one after the other."""
        left = iter(times)

        def call() -> None:
            self.seconds += next(left, 0.0)

        return call


CLOCK = Clock()


def cases() -> list[Any]:
    """Name and settings of each benchmark."""
    found = []
    for name, operation in OPERATIONS.items():
        if operation.default_dtype == "int8":
            every = {f"{tokens}-tokens": Settings(name, tokens=(tokens,)) for tokens in TOKENS}
        elif name == "barrier":
            every = {"": Settings(name)}
        else:
            every = {f"{size}-bytes": Settings(name, begin=size, end=size) for size in SIZES}
        found += [pytest.param(settings, id=f"{name}-{size}".rstrip("-")) for size, settings in every.items()]
    return found


def sample(comm: xccl.Communicator, settings: Settings) -> Sample:
    """One size, measured by this rank and the others."""
    operation, dtype = runner.find(settings, comm.size)
    place(comm, settings.pin)
    context = Context(comm, settings, dtype)
    return take(context, operation, operation.counts(settings, context.dtype.itemsize, comm.size)[0])


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.parametrize("settings", cases())
def test_operation(settings: Settings, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Each block is a round."""
    ranks = request.config.getoption("--ranks")
    measured: Sample = xccl.run(sample, ranks, settings, timeout=SECONDS)[0]
    if measured.wrong != [0]:
        pytest.fail(f"{measured.wrong} wrong elements")
    times = [float(microseconds) / 1e6 for microseconds in measured.times[0]]
    benchmark.group = settings.operation
    benchmark.extra_info |= {"ranks": ranks, "size": measured.size}
    benchmark.pedantic(CLOCK.replay(times), rounds=len(times))
