"""send: a message from one rank of a pair to the other, as half a ping-pong."""

from __future__ import annotations

from xccl.bench.operation import Case, Operation, as_bytes, elements, pattern, unit_factor


class PairCase(Case):
    """Ranks 0 and 1, 2 and 3, ... work in pairs; the last of an odd number has no peer and does nothing."""

    def prepare(self) -> None:
        rank = self.comm.rank
        self.peer = rank ^ 1
        self.idle = self.peer >= self.comm.size
        self.first = rank < self.peer
        self.pairs = []
        for buffer in range(self.buffers):
            x = self.source(pattern(rank, buffer, self.count, self.context.dtype))
            self.pairs.append((x, self.receive(pattern(self.peer, buffer, self.count, self.context.dtype))))
        if self.idle:
            self.results.clear()


class Send(PairCase):
    """By `comm.send` and `comm.recv`."""

    calls = 2

    def run(self, i: int) -> None:
        x, out = self.pairs[i % self.buffers]
        if self.idle:
            return
        if self.first:
            self.comm.send(x, self.peer)
            self.comm.recv(out, self.peer)
        else:
            self.comm.recv(out, self.peer)
            self.comm.send(x, self.peer)


class MpiSend(PairCase):
    """By Send and Recv."""

    calls = 2
    by_mpi = True

    def prepare(self) -> None:
        super().prepare()
        self.pairs = [(as_bytes(x), as_bytes(out)) for x, out in self.pairs]

    def run(self, i: int) -> None:
        x, out = self.pairs[i % self.buffers]
        world = self.context.world
        if self.idle:
            return
        if self.first:
            world.Send(x, self.peer)
            world.Recv(out, self.peer)
        else:
            world.Recv(out, self.peer)
            world.Send(x, self.peer)


OPERATION = Operation(
    name="send",
    size="bytes of a message; the time is half a ping-pong",
    factor=unit_factor,
    counts=elements,
    case=Send,
    mpi=MpiSend,
    mpi_does="Send and Recv",
    min_ranks=2,
)
