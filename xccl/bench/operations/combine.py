"""combine: the experts' outputs back to the tokens' ranks, weighted and summed."""

from __future__ import annotations

from xccl.bench.operation import Operation, Versus, unit_factor
from xccl.bench.operations.moe_case import MOE_DTYPES, MoeCase, MpiMoeCase, token_counts
from xccl.bench.operations.moe_packed import PackedCombine


class Combine(MoeCase):
    """By `ep.combine`, after a dispatch that is not timed."""

    combines = True

    def before(self, i: int) -> None:
        self.dispatch(i % self.buffers)
        self.settle()

    def run(self, i: int) -> None:
        self.combine(i % self.buffers)


class MpiCombine(MpiMoeCase, Combine):
    """By the twin: Alltoallv of rows, and NumPy."""


OPERATION = Operation(
    name="combine",
    size="bytes of the outputs that the busiest rank sums up, own ones too; calls are timed one by one",
    factor=unit_factor,
    counts=token_counts,
    case=Combine,
    versus={
        "mpi": Versus(MpiCombine, "Alltoallv of rows, and NumPy"),
        "mpi-packed": Versus(PackedCombine, "Alltoallv of packed bytes, nothing else"),
    },
    dtypes=MOE_DTYPES,
    default_dtype="int8",
)
