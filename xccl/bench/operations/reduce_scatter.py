"""reduce_scatter: the sum of an array over all ranks, a part on each rank."""

from __future__ import annotations

from xccl.bench.operation import MPI_SUM_DTYPES, Case, Operation, divisible_elements, pattern, pattern_sum, peers_factor


class ReduceScatter(Case):
    """By `comm.reduce_scatter`."""

    def prepare(self) -> None:
        rank, size, dtype = self.comm.rank, self.comm.size, self.context.dtype
        part = self.count // size
        self.pairs = []
        for buffer in range(self.buffers):
            x = self.source(pattern(rank, buffer, self.count, dtype))
            self.pairs.append((x, self.receive(pattern_sum(size, buffer, part, dtype, rank * part))))

        if not self.by_mpi:
            self.ready = [self.call("reduce_scatter", x, out=out) for x, out in self.pairs]

    def run(self, i: int) -> None:
        self.ready[i % self.buffers]()


class MpiReduceScatter(ReduceScatter):
    """By Reduce_scatter_block."""

    by_mpi = True

    def run(self, i: int) -> None:
        self.context.world.Reduce_scatter_block(*self.pairs[i % self.buffers])


OPERATION = Operation(
    name="reduce_scatter",
    size="bytes of x on a rank; size / ranks stays on each; the reduction is a sum",
    factor=peers_factor,
    counts=divisible_elements,
    case=ReduceScatter,
    mpi=MpiReduceScatter,
    mpi_does="Reduce_scatter_block",
    mpi_dtypes=MPI_SUM_DTYPES,
    can_prepare=True,
)
