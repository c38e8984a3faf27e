"""reduce_scatter: the sum of an array over all ranks, a part on each rank."""

from __future__ import annotations

from xccl.bench.operation import (
    MPI_SUM_DTYPES,
    Array,
    Operation,
    Versus,
    divisible_elements,
    pattern,
    pattern_sum,
    peers_factor,
)
from xccl.bench.operations.exchange import Exchange


class ReduceScatter(Exchange):
    """By `comm.reduce_scatter`."""

    method = "reduce_scatter"

    def pair(self, buffer: int) -> tuple[Array, Array]:
        rank, size, dtype = self.comm.rank, self.comm.size, self.context.dtype
        part = self.count // size
        x = self.source(pattern(rank, buffer, self.count, dtype))
        return x, self.receive(pattern_sum(size, buffer, part, dtype, rank * part))


class MpiReduceScatter(ReduceScatter):
    """By Reduce_scatter_block."""

    is_twin = True

    def run(self, i: int) -> None:
        self.context.world.Reduce_scatter_block(*self.pairs[i % self.buffers])


OPERATION = Operation(
    name="reduce_scatter",
    size="bytes of x on a rank; size / ranks stays on each; the reduction is a sum",
    factor=peers_factor,
    counts=divisible_elements,
    case=ReduceScatter,
    versus={"mpi": Versus(MpiReduceScatter, "Reduce_scatter_block", MPI_SUM_DTYPES)},
    can_prepare=True,
)
