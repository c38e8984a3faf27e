"""send: a message from one rank of a pair to the other, as half a ping-pong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from xccl.bench.operation import Array, Operation, Versus, elements, unit_factor
from xccl.bench.operations.pairs import PairCase


class Send(PairCase):
    """By `comm.send` and `comm.recv`."""

    calls = 2

    def prepare(self) -> None:
        super().prepare()
        self.ready: list[tuple[Callable[[], object], Callable[[], object]]] = []
        for x, out in self.pairs if not self.idle else []:
            send, recv = self.calls_of(x, out)
            self.ready.append((send, recv) if self.first else (recv, send))

    def calls_of(self, x: Array, out: Array) -> tuple[Callable[[], object], Callable[[], object]]:
        """send and recv on one set of arrays; a twin has its own."""
        return self.call("send", x, self.peer), self.call("recv", out, self.peer)

    def run(self, i: int) -> None:
        if self.ready:
            one, other = self.ready[i % self.buffers]
            one()
            other()


class MpiSend(Send):
    """By Send and Recv."""

    is_twin = True

    def calls_of(self, x: Array, out: Array) -> tuple[Callable[[], object], Callable[[], object]]:
        world = self.context.world
        return partial(world.Send, x, self.peer), partial(world.Recv, out, self.peer)


class GlooSend(Send):
    """By send and recv."""

    is_twin = True

    def calls_of(self, x: Array, out: Array) -> tuple[Callable[[], object], Callable[[], object]]:
        gloo = self.context.library
        send, recv = gloo.distributed.send, gloo.distributed.recv
        return partial(send, gloo.tensor(x), self.peer), partial(recv, gloo.tensor(out), self.peer)


OPERATION = Operation(
    name="send",
    size="bytes of a message; the time is half a ping-pong",
    factor=unit_factor,
    counts=elements,
    case=Send,
    versus={"mpi": Versus(MpiSend, "Send and Recv"), "gloo": Versus(GlooSend, "send and recv")},
    min_ranks=2,
    can_prepare=True,
)
