"""all_gather: an array of each rank to all ranks."""

from __future__ import annotations

import numpy as np

from xccl.bench.operation import Array, Operation, Versus, divisible_elements, pattern, peers_factor
from xccl.bench.operations.exchange import BytesByMpi, Exchange


class AllGather(Exchange):
    """By `comm.all_gather`."""

    method = "all_gather"

    def pair(self, buffer: int) -> tuple[Array, Array]:
        size, dtype = self.comm.size, self.context.dtype
        part = self.count // size
        parts = [pattern(peer, buffer, part, dtype) for peer in range(size)]
        out = self.receive(np.concatenate(parts))
        return self.source(parts[self.comm.rank]), out.reshape(size, part)


class MpiAllGather(BytesByMpi, AllGather):
    """By Allgather."""

    def run(self, i: int) -> None:
        self.context.world.Allgather(*self.pairs[i % self.buffers])


OPERATION = Operation(
    name="all_gather",
    size="bytes of the result on a rank; each rank gives size / ranks",
    factor=peers_factor,
    counts=divisible_elements,
    case=AllGather,
    versus={"mpi": Versus(MpiAllGather, "Allgather")},
    can_prepare=True,
)
