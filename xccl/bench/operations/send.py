"""send: a message from one rank of a pair to the other, as half a ping-pong."""

from __future__ import annotations

from collections.abc import Callable

from xccl.bench.operation import Operation, Versus, elements, unit_factor
from xccl.bench.operations.pairs import PairCase


class Send(PairCase):
    """By `comm.send` and `comm.recv`."""

    calls = 2

    def prepare(self) -> None:
        super().prepare()
        self.ready: list[tuple[Callable[[], object], Callable[[], object]]] = []
        for x, out in self.pairs if not self.idle else []:
            send, recv = self.call("send", x, self.peer), self.call("recv", out, self.peer)
            self.ready.append((send, recv) if self.first else (recv, send))

    def run(self, i: int) -> None:
        if self.ready:
            one, other = self.ready[i % self.buffers]
            one()
            other()


class MpiSend(PairCase):
    """By Send and Recv."""

    calls = 2
    is_twin = True

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
    versus={"mpi": Versus(MpiSend, "Send and Recv")},
    min_ranks=2,
    can_prepare=True,
)
