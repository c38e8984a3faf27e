"""all_reduce: the sum of an array over all ranks, on all ranks."""

from __future__ import annotations

from xccl.bench.operation import MPI_SUM_DTYPES, Case, Operation, all_reduce_factor, elements, pattern, pattern_sum


class AllReduce(Case):
    """By `comm.all_reduce`."""

    def prepare(self) -> None:
        rank, size, dtype = self.comm.rank, self.comm.size, self.context.dtype
        self.pairs = []
        for buffer in range(self.buffers):
            x = self.source(pattern(rank, buffer, self.count, dtype))
            self.pairs.append((x, self.receive(pattern_sum(size, buffer, self.count, dtype))))

        if not self.by_mpi:
            self.ready = [self.call("all_reduce", x, out=out) for x, out in self.pairs]

    def run(self, i: int) -> None:
        self.ready[i % self.buffers]()


class MpiAllReduce(AllReduce):
    """By Allreduce."""

    by_mpi = True

    def run(self, i: int) -> None:
        self.context.world.Allreduce(*self.pairs[i % self.buffers])


OPERATION = Operation(
    name="all_reduce",
    size="bytes of the array on a rank; the reduction is a sum",
    factor=all_reduce_factor,
    counts=elements,
    case=AllReduce,
    mpi=MpiAllReduce,
    mpi_does="Allreduce",
    mpi_dtypes=MPI_SUM_DTYPES,
    can_prepare=True,
)
