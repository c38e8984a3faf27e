"""all_gather: an array of each rank to all ranks."""

from __future__ import annotations

import numpy as np

from xccl.bench.operation import Case, Operation, as_bytes, divisible_elements, pattern, peers_factor


class AllGather(Case):
    """By `comm.all_gather`."""

    def prepare(self) -> None:
        size, dtype = self.comm.size, self.context.dtype
        part = self.count // size
        self.pairs = []
        for buffer in range(self.buffers):
            parts = [pattern(peer, buffer, part, dtype) for peer in range(size)]
            out = self.receive(np.concatenate(parts))
            self.pairs.append((self.source(parts[self.comm.rank]), out.reshape(size, part)))

        if not self.by_mpi:
            self.ready = [self.call("all_gather", x, out=out) for x, out in self.pairs]

    def run(self, i: int) -> None:
        self.ready[i % self.buffers]()


class MpiAllGather(AllGather):
    """By Allgather."""

    by_mpi = True

    def prepare(self) -> None:
        super().prepare()
        self.pairs = [(as_bytes(x), as_bytes(out)) for x, out in self.pairs]

    def run(self, i: int) -> None:
        x, out = self.pairs[i % self.buffers]
        self.context.world.Allgather(x, out)


OPERATION = Operation(
    name="all_gather",
    size="bytes of the result on a rank; each rank gives size / ranks",
    factor=peers_factor,
    counts=divisible_elements,
    case=AllGather,
    mpi=MpiAllGather,
    mpi_does="Allgather",
    can_prepare=True,
)
