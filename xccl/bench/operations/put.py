"""put: one rank of a pair writes to the other's memory; complete when it returns from quiet."""

from __future__ import annotations

from xccl.bench.operation import Operation, Versus, elements, unit_factor
from xccl.bench.operations.pairs import PairCase, WindowCase


class Put(PairCase):
    """By `comm.put` and `comm.quiet`."""

    symmetric_out = True

    def prepare(self) -> None:
        super().prepare()
        if self.first:
            self.results.clear()
        active = self.first and not self.idle
        self.ready = [self.call("put", out, x, self.peer) for x, out in self.pairs] if active else []

    def run(self, i: int) -> None:
        if self.ready:
            self.ready[i % self.buffers]()
            self.comm.quiet()


class MpiPut(WindowCase):
    """By Put and Flush."""

    def prepare(self) -> None:
        super().prepare()
        if self.first:
            self.results.clear()
        self.expect_in_window()

    def run(self, i: int) -> None:
        buffer = i % self.buffers
        if self.first and not self.idle:
            self.window.Put(self.pairs[buffer][0], self.peer, self.at[buffer])
            self.window.Flush(self.peer)


OPERATION = Operation(
    name="put",
    size="bytes that rank 0 of a pair writes into rank 1's memory; rank 1 does nothing",
    factor=unit_factor,
    counts=elements,
    case=Put,
    versus={"mpi": Versus(MpiPut, "Put and Flush in a window of Win.Allocate")},
    min_ranks=2,
    can_prepare=True,
)
