"""all_reduce: the sum of an array over all ranks, on all ranks."""

from __future__ import annotations

from xccl.bench.operation import (
    MPI_SUM_DTYPES,
    Array,
    Operation,
    Versus,
    all_reduce_factor,
    elements,
    pattern,
    pattern_sum,
)
from xccl.bench.operations.exchange import Exchange


class AllReduce(Exchange):
    """By `comm.all_reduce`."""

    method = "all_reduce"

    def pair(self, buffer: int) -> tuple[Array, Array]:
        size, dtype = self.comm.size, self.context.dtype
        x = self.source(pattern(self.comm.rank, buffer, self.count, dtype))
        return x, self.receive(pattern_sum(size, buffer, self.count, dtype))


class MpiAllReduce(AllReduce):
    """By Allreduce."""

    is_twin = True

    def run(self, i: int) -> None:
        self.context.world.Allreduce(*self.pairs[i % self.buffers])


OPERATION = Operation(
    name="all_reduce",
    size="bytes of the array on a rank; the reduction is a sum",
    factor=all_reduce_factor,
    counts=elements,
    case=AllReduce,
    versus={"mpi": Versus(MpiAllReduce, "Allreduce", MPI_SUM_DTYPES)},
    can_prepare=True,
)
