"""put_signal: data and a signal from one rank of a pair to the other, until the other has seen it."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from xccl.bench.operation import Operation, Versus, elements, unit_factor
from xccl.bench.operations.pairs import PairCase, WindowCase

_POLLS = 1000  # before the core goes to another rank that wants it


class PutSignal(PairCase):
    """By `comm.put_signal` and `comm.wait_until`, there and back.

    Each turn sets the signal to its number; a prepared call, whose arguments are always the same, adds one.
    """

    calls = 2
    symmetric_out = True

    def prepare(self) -> None:
        super().prepare()
        self.signal = self.context.signal()
        self.turn = 0
        self.ready: list[Callable[[], object]] = []
        if self.context.settings.prepared and not self.idle:
            adding = {"signal": self.signal, "value": 1, "op": "add"}
            self.ready = [self.call("put_signal", out, x, self.peer, **adding) for x, out in self.pairs]

    def run(self, i: int) -> None:
        if self.idle:
            return
        self.turn += 1
        if self.first:
            self._put(i % self.buffers)
            self.comm.wait_until(self.signal, ">=", self.turn)
        else:
            self.comm.wait_until(self.signal, ">=", self.turn)
            self._put(i % self.buffers)

    def _put(self, buffer: int) -> None:
        if self.ready:
            self.ready[buffer]()
        else:
            x, out = self.pairs[buffer]
            self.comm.put_signal(out, x, self.peer, signal=self.signal, value=self.turn)


class MpiPutSignal(WindowCase):
    """By Put and Flush, of the data and then of a flag that the peer polls in its window.

    The flag is Put too. Accumulate with REPLACE, which is atomic by the standard, and not only because an aligned word
    is one store, takes 2 to 6 % longer in Open MPI, MPICH and Intel MPI; Fetch_and_op and an empty message take longer.
    """

    calls = 2
    head = 64  # the flag has a cache line of its own

    def prepare(self) -> None:
        super().prepare()
        self.expect_in_window()
        self.flag = memoryview(self.window.tomemory())[:8].cast("Q")
        self.flag[0] = 0
        self.window.Sync()
        self.turn = 0
        self.sent = np.zeros(1, np.uint64)
        self.comm.barrier()

    def run(self, i: int) -> None:
        if self.idle:
            return
        self.turn += 1
        if self.first:
            self._put(i % self.buffers)
            self._wait()
        else:
            self._wait()
            self._put(i % self.buffers)

    def _put(self, buffer: int) -> None:
        window, peer = self.window, self.peer
        window.Put(self.pairs[buffer][0], peer, self.at[buffer])
        window.Flush(peer)
        self.sent[0] = self.turn
        window.Put(self.sent, peer, 0)
        window.Flush(peer)

    def _wait(self) -> None:
        flag, turn, sync = self.flag, self.turn, self.window.Sync
        while True:
            for _ in range(_POLLS):
                if flag[0] >= turn:
                    return
                sync()
            os.sched_yield()

    def close(self) -> None:
        self.flag.release()
        super().close()


OPERATION = Operation(
    name="put_signal",
    size="bytes put into the peer's memory; the time is half of there and back, seen by the receiver each way",
    factor=unit_factor,
    counts=elements,
    case=PutSignal,
    versus={"mpi": Versus(MpiPutSignal, "Put and Flush of the data, then of a flag that the receiver polls")},
    min_ranks=2,
    can_prepare=True,
)
