"""bandwidth: many messages on their way at once, as in the OSU benchmark."""

from __future__ import annotations

import numpy as np

from xccl.bench.operation import Operation, Versus, elements, unit_factor
from xccl.bench.operations.pairs import PairCase

WINDOW = 64  # messages between two acknowledgements


class Bandwidth(PairCase):
    """By `comm.isend` and `comm.irecv`."""

    calls = WINDOW

    def prepare(self) -> None:
        super().prepare()
        self.acknowledgement = np.zeros(1, np.uint8)
        if self.first:
            self.results.clear()

    def wrong(self, runs: int) -> int:
        return super().wrong(runs * WINDOW)

    def run(self, i: int) -> None:
        if self.idle:
            return
        if self.first:
            requests = [self.comm.isend(self.pairs[j % self.buffers][0], self.peer) for j in range(WINDOW)]
        else:
            requests = [self.comm.irecv(self.pairs[j % self.buffers][1], self.peer) for j in range(WINDOW)]
        for request in requests:
            request.wait()
        if self.first:
            self.comm.recv(self.acknowledgement, self.peer, 1)
        else:
            self.comm.send(self.acknowledgement, self.peer, 1)


class MpiBandwidth(Bandwidth):
    """By Isend, Irecv and Waitall."""

    is_twin = True

    def run(self, i: int) -> None:
        if self.idle:
            return
        mpi, world = self.context.mpi, self.context.world
        if self.first:
            requests = [world.Isend(self.pairs[j % self.buffers][0], self.peer) for j in range(WINDOW)]
        else:
            requests = [world.Irecv(self.pairs[j % self.buffers][1], self.peer) for j in range(WINDOW)]
        mpi.Request.Waitall(requests)
        if self.first:
            world.Recv(self.acknowledgement, self.peer, 1)
        else:
            world.Send(self.acknowledgement, self.peer, 1)


OPERATION = Operation(
    name="bandwidth",
    size=f"bytes of a message, {WINDOW} on their way one way at once; the time is that of one message",
    factor=unit_factor,
    counts=elements,
    case=Bandwidth,
    versus={"mpi": Versus(MpiBandwidth, "Isend, Irecv and Waitall")},
    min_ranks=2,
)
