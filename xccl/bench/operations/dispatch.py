"""dispatch: tokens to the ranks of their experts."""

from __future__ import annotations

from xccl.bench.operation import Operation, Versus, unit_factor
from xccl.bench.operations.moe_case import MOE_DTYPES, MoeCase, MpiMoeCase, token_counts
from xccl.bench.operations.moe_packed import PackedDispatch


class Dispatch(MoeCase):
    """By `ep.dispatch`."""

    dispatches = True

    def run(self, i: int) -> None:
        self.dispatch(i % self.buffers)


class MpiDispatch(MpiMoeCase, Dispatch):
    """By the twin: Alltoall of counts, Alltoallv of rows, and NumPy."""


OPERATION = Operation(
    name="dispatch",
    size="bytes of the rows that must move to the busiest rank, once a token and rank, own ones too",
    factor=unit_factor,
    counts=token_counts,
    case=Dispatch,
    versus={
        "mpi": Versus(MpiDispatch, "Alltoall of counts, Alltoallv of rows, and NumPy"),
        "mpi-packed": Versus(PackedDispatch, "Alltoallv of packed bytes, nothing else"),
    },
    dtypes=MOE_DTYPES,
    default_dtype="int8",
)
