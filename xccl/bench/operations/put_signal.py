"""put_signal: data and a signal from one rank of a pair to the other, until the other has seen it."""

from __future__ import annotations

from xccl.bench.operation import Operation, Versus, elements, unit_factor
from xccl.bench.operations.pairs import PairCase
from xccl.bench.operations.put import MpiPut


class PutSignal(PairCase):
    """By `comm.put_signal` and `comm.wait_until`, there and back."""

    calls = 2
    symmetric_out = True

    def prepare(self) -> None:
        super().prepare()
        self.signal = self.context.signal()
        self.turn = 0

    def run(self, i: int) -> None:
        x, out = self.pairs[i % self.buffers]
        if self.idle:
            return
        self.turn += 1
        if self.first:
            self.comm.put_signal(out, x, self.peer, signal=self.signal, value=self.turn)
            self.comm.wait_until(self.signal, ">=", self.turn)
        else:
            self.comm.wait_until(self.signal, ">=", self.turn)
            self.comm.put_signal(out, x, self.peer, signal=self.signal, value=self.turn)


OPERATION = Operation(
    name="put_signal",
    size="bytes put into the peer's memory; the time is half of there and back, seen by the receiver each way",
    factor=unit_factor,
    counts=elements,
    case=PutSignal,
    versus={"mpi": Versus(MpiPut, "Put and Flush, of which the receiver sees nothing")},
    min_ranks=2,
)
