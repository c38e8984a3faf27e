"""all_to_all: every rank sends a part to every rank."""

from __future__ import annotations

import numpy as np

from xccl.bench.operation import Case, Operation, as_bytes, divisible_elements, pattern, peers_factor


class AllToAll(Case):
    """By `comm.all_to_all`."""

    def prepare(self) -> None:
        rank, size, dtype = self.comm.rank, self.comm.size, self.context.dtype
        part = self.count // size
        self.pairs = []
        for buffer in range(self.buffers):
            x = self.source(pattern(rank, buffer, self.count, dtype))
            arriving = [pattern(peer, buffer, part, dtype, rank * part) for peer in range(size)]
            self.pairs.append((x, self.receive(np.concatenate(arriving))))

        if not self.by_mpi:
            self.ready = [self.call("all_to_all", x, out=out) for x, out in self.pairs]

    def run(self, i: int) -> None:
        self.ready[i % self.buffers]()


class MpiAllToAll(AllToAll):
    """By Alltoall."""

    by_mpi = True

    def prepare(self) -> None:
        super().prepare()
        self.pairs = [(as_bytes(x), as_bytes(out)) for x, out in self.pairs]

    def run(self, i: int) -> None:
        x, out = self.pairs[i % self.buffers]
        self.context.world.Alltoall(x, out)


OPERATION = Operation(
    name="all_to_all",
    size="bytes of x on a rank, all peers together: size / ranks goes to each",
    factor=peers_factor,
    counts=divisible_elements,
    case=AllToAll,
    mpi=MpiAllToAll,
    mpi_does="Alltoall",
    can_prepare=True,
)
