"""get: one rank of a pair reads the other's memory."""

from __future__ import annotations

from xccl.bench.operation import Operation, Versus, elements, unit_factor
from xccl.bench.operations.pairs import PairCase, WindowCase


class Get(PairCase):
    """By `comm.get`."""

    symmetric_source = True

    def prepare(self) -> None:
        super().prepare()
        if not self.first:
            self.results.clear()
        active = self.first and not self.idle
        self.ready = [self.call("get", out, x, self.peer) for x, out in self.pairs] if active else []

    def run(self, i: int) -> None:
        if self.ready:
            self.ready[i % self.buffers]()


class MpiGet(WindowCase):
    """By Get and Flush."""

    def prepare(self) -> None:
        super().prepare()
        for memory, (x, _) in zip(self.exposed, self.pairs, strict=True):
            memory[...] = x
        self.window.Sync()
        if not self.first:
            self.results.clear()
        self.comm.barrier()

    def run(self, i: int) -> None:
        buffer = i % self.buffers
        if self.first and not self.idle:
            self.window.Get(self.pairs[buffer][1], self.peer, self.at[buffer])
            self.window.Flush(self.peer)


OPERATION = Operation(
    name="get",
    size="bytes that rank 0 of a pair reads from rank 1's memory; rank 1 does nothing",
    factor=unit_factor,
    counts=elements,
    case=Get,
    versus={"mpi": Versus(MpiGet, "Get and Flush in a window of Win.Allocate")},
    min_ranks=2,
    can_prepare=True,
)
