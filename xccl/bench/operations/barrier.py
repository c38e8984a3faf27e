"""barrier: returns when all ranks have called it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from xccl.bench.operation import Case, Operation, Versus, once, unit_factor

_CHECKS = 5


class Barrier(Case):
    """By `comm.barrier`."""

    def prepare(self) -> None:
        self.stamps = self.context.empty(self.comm.size, symmetric=True)
        self.ready = self.call_of()

    def call_of(self) -> Callable[[], object]:
        """The call; a twin has its own."""
        return self.call("barrier")

    def run(self, i: int) -> None:
        self.ready()

    def wrong(self, runs: int) -> int:
        """Stamps of peers that are not there after a barrier which they called after stamping."""
        missing = 0
        rank = self.comm.rank
        for stamp in np.arange(1, _CHECKS + 1, dtype=self.stamps.dtype):
            for peer in range(self.comm.size):
                self.comm.put(self.stamps[rank : rank + 1], np.array([stamp]), peer)
            self.run(0)
            missing += int((self.stamps < stamp).sum())
        return missing


class MpiBarrier(Barrier):
    """By Barrier."""

    is_twin = True

    def call_of(self) -> Callable[[], object]:
        barrier: Callable[[], object] = self.context.world.Barrier
        return barrier


class GlooBarrier(Barrier):
    """By barrier."""

    is_twin = True

    def call_of(self) -> Callable[[], object]:
        barrier: Callable[[], object] = self.context.library.distributed.barrier
        return barrier


OPERATION = Operation(
    name="barrier",
    size="none",
    factor=unit_factor,
    counts=once,
    case=Barrier,
    versus={"mpi": Versus(MpiBarrier, "Barrier"), "gloo": Versus(GlooBarrier, "barrier")},
    can_prepare=True,
)
