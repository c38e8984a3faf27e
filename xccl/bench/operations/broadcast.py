"""broadcast: rank 0's array to all ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from xccl.bench.operation import Array, Case, Operation, Versus, as_bytes, elements, pattern, unit_factor

ROOT = 0


class Broadcast(Case):
    """By `comm.broadcast`, in place."""

    def prepare(self) -> None:
        arrays = []
        for buffer in range(self.buffers):
            content = pattern(ROOT, buffer, self.count, self.context.dtype)
            arrays.append(self.source(content) if self.comm.rank == ROOT else self.receive(content))
        self.ready = [self.call_of(a) for a in arrays]

    def call_of(self, a: Array) -> Callable[[], object]:
        """The call on one array; a twin has its own."""
        return self.call("broadcast", a, ROOT)

    def run(self, i: int) -> None:
        self.ready[i % self.buffers]()


class MpiBroadcast(Broadcast):
    """By Bcast."""

    is_twin = True

    def call_of(self, a: Array) -> Callable[[], object]:
        return partial(self.context.world.Bcast, as_bytes(a), ROOT)


class GlooBroadcast(Broadcast):
    """By broadcast."""

    is_twin = True

    def call_of(self, a: Array) -> Callable[[], object]:
        gloo = self.context.library
        return partial(gloo.distributed.broadcast, gloo.tensor(as_bytes(a)), ROOT)


OPERATION = Operation(
    name="broadcast",
    size="bytes of the array",
    factor=unit_factor,
    counts=elements,
    case=Broadcast,
    versus={"mpi": Versus(MpiBroadcast, "Bcast"), "gloo": Versus(GlooBroadcast, "broadcast")},
    can_prepare=True,
)
