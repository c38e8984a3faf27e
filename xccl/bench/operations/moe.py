"""moe: dispatch and combine, as in a layer whose experts take no time."""

from __future__ import annotations

from xccl.bench.operation import Operation, Versus, unit_factor
from xccl.bench.operations.moe_case import MOE_DTYPES, MoeCase, MpiMoeCase, token_counts
from xccl.bench.operations.moe_packed import PackedMoe


class Moe(MoeCase):
    """By `ep.dispatch` and `ep.combine`."""

    dispatches = True
    combines = True

    def run(self, i: int) -> None:
        self.dispatch(i % self.buffers)
        self.combine(i % self.buffers)


class MpiMoe(MpiMoeCase, Moe):
    """By the twin: Alltoall of counts, Alltoallv of rows each way, and NumPy."""


OPERATION = Operation(
    name="moe",
    size="bytes of rows that must move to the busiest rank: out once a token and rank, back once a token and expert",
    factor=unit_factor,
    counts=token_counts,
    case=Moe,
    versus={
        "mpi": Versus(MpiMoe, "Alltoall of counts, Alltoallv of rows each way, and NumPy"),
        "mpi-packed": Versus(PackedMoe, "two Alltoallv of packed bytes, nothing else"),
    },
    dtypes=MOE_DTYPES,
    default_dtype="int8",
)
