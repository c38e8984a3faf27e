"""all_to_all: every rank sends a part to every rank."""

from __future__ import annotations

import numpy as np

from xccl.bench.operation import Array, Operation, Versus, divisible_elements, pattern, peers_factor
from xccl.bench.operations.exchange import BytesByMpi, Exchange


class AllToAll(Exchange):
    """By `comm.all_to_all`."""

    method = "all_to_all"

    def pair(self, buffer: int) -> tuple[Array, Array]:
        rank, size, dtype = self.comm.rank, self.comm.size, self.context.dtype
        part = self.count // size
        arriving = [pattern(peer, buffer, part, dtype, rank * part) for peer in range(size)]
        return self.source(pattern(rank, buffer, self.count, dtype)), self.receive(np.concatenate(arriving))


class MpiAllToAll(BytesByMpi, AllToAll):
    """By Alltoall."""

    def run(self, i: int) -> None:
        self.context.world.Alltoall(*self.pairs[i % self.buffers])


OPERATION = Operation(
    name="all_to_all",
    size="bytes of x on a rank, all peers together: size / ranks goes to each",
    factor=peers_factor,
    counts=divisible_elements,
    case=AllToAll,
    versus={"mpi": Versus(MpiAllToAll, "Alltoall")},
    can_prepare=True,
)
