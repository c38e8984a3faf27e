"""e2a: the experts' outputs back to the attention ranks, weighted and summed."""

from __future__ import annotations

from xccl.bench.operation import Operation, Versus, unit_factor
from xccl.bench.operations.attention_case import AttentionCase, MpiAttentionCase
from xccl.bench.operations.moe_case import MOE_DTYPES, token_counts


class E2A(AttentionCase):
    """By `ae.e2a_send` and `ae.e2a`, after an A2E that is not timed."""

    combines = True

    def before(self, i: int) -> None:
        self.go_out(i % self.buffers)
        self.settle()

    def run(self, i: int) -> None:
        self.come_back()


class MpiE2A(MpiAttentionCase, E2A):
    """By the twin: Alltoallv of rows on an intercommunicator, and NumPy."""


OPERATION = Operation(
    name="e2a",
    size="bytes of the outputs that the busiest attention rank sums up; calls are timed one by one",
    factor=unit_factor,
    counts=token_counts,
    case=E2A,
    versus={"mpi": Versus(MpiE2A, "Alltoallv of rows on an intercommunicator, and NumPy")},
    min_ranks=2,
    dtypes=MOE_DTYPES,
    default_dtype="int8",
)
