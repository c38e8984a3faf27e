"""broadcast: rank 0's array to all ranks."""

from __future__ import annotations

from xccl.bench.operation import Case, Operation, Versus, as_bytes, elements, pattern, unit_factor

ROOT = 0


class Broadcast(Case):
    """By `comm.broadcast`, in place."""

    def prepare(self) -> None:
        self.arrays = []
        for buffer in range(self.buffers):
            content = pattern(ROOT, buffer, self.count, self.context.dtype)
            if self.comm.rank == ROOT:
                self.arrays.append(self.source(content))
            else:
                self.arrays.append(self.receive(content))

        if not self.is_twin:
            self.ready = [self.call("broadcast", a, ROOT) for a in self.arrays]

    def run(self, i: int) -> None:
        self.ready[i % self.buffers]()


class MpiBroadcast(Broadcast):
    """By Bcast."""

    is_twin = True

    def prepare(self) -> None:
        super().prepare()
        self.arrays = [as_bytes(a) for a in self.arrays]

    def run(self, i: int) -> None:
        self.context.world.Bcast(self.arrays[i % self.buffers], ROOT)


OPERATION = Operation(
    name="broadcast",
    size="bytes of the array",
    factor=unit_factor,
    counts=elements,
    case=Broadcast,
    versus={"mpi": Versus(MpiBroadcast, "Bcast")},
    can_prepare=True,
)
