"""bandwidth: many messages on their way at once, as in the OSU benchmark."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

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
        self.window: list[Any] = [x if self.first else out for x, out in self.pairs]
        self.choose()

    def choose(self) -> None:
        """The calls that `run` makes; a twin has its own."""
        comm = self.comm
        self.start: Callable[..., Any] = comm.isend if self.first else comm.irecv
        self.finish: Callable[[list[Any]], object] = _wait_for_all
        self.acknowledge: Callable[[], object] = partial(
            comm.recv if self.first else comm.send, self.acknowledgement, self.peer, 1
        )

    def wrong(self, runs: int) -> int:
        return super().wrong(runs * WINDOW)

    def run(self, i: int) -> None:
        if self.idle:
            return
        start, peer, buffers = self.start, self.peer, self.buffers
        requests = [start(self.window[j % buffers], peer) for j in range(WINDOW)]
        self.finish(requests)
        self.acknowledge()


class MpiBandwidth(Bandwidth):
    """By Isend, Irecv and Waitall."""

    is_twin = True

    def choose(self) -> None:
        world = self.context.world
        self.start = world.Isend if self.first else world.Irecv
        self.finish = self.context.mpi.Request.Waitall
        self.acknowledge = partial(world.Recv if self.first else world.Send, self.acknowledgement, self.peer, 1)


class GlooBandwidth(Bandwidth):
    """By isend, irecv and wait."""

    is_twin = True

    def choose(self) -> None:
        gloo = self.context.library
        distributed = gloo.distributed
        self.window = [gloo.tensor(a) for a in self.window]
        self.start = distributed.isend if self.first else distributed.irecv
        self.finish = _wait_for_all
        reply = gloo.tensor(self.acknowledgement)
        self.acknowledge = partial(distributed.recv if self.first else distributed.send, reply, self.peer, tag=1)


def _wait_for_all(requests: list[Any]) -> None:
    for request in requests:
        request.wait()


OPERATION = Operation(
    name="bandwidth",
    size=f"bytes of a message, {WINDOW} on their way one way at once; the time is that of one message",
    factor=unit_factor,
    counts=elements,
    case=Bandwidth,
    versus={
        "mpi": Versus(MpiBandwidth, "Isend, Irecv and Waitall"),
        "gloo": Versus(GlooBandwidth, "isend, irecv and wait"),
    },
    min_ranks=2,
)
