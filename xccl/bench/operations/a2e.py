"""a2e: tokens from attention ranks to the ranks of their experts."""

from __future__ import annotations

from xccl.bench.operation import Operation, Versus, unit_factor
from xccl.bench.operations.attention_case import AttentionCase, MpiAttentionCase
from xccl.bench.operations.moe_case import MOE_DTYPES, token_counts


class A2E(AttentionCase):
    """By `ae.a2e` and `ae.a2e_recv`; the outputs come back between the calls, which is not timed."""

    dispatches = True

    def before(self, i: int) -> None:
        self.come_back()
        self.settle()

    def run(self, i: int) -> None:
        self.go_out(i % self.buffers)


class MpiA2E(MpiAttentionCase, A2E):
    """By the twin: Alltoall of counts, Alltoallv of rows on an intercommunicator, and NumPy."""


OPERATION = Operation(
    name="a2e",
    size="bytes of the rows that must move to the busiest expert rank, once a token; calls are timed one by one",
    factor=unit_factor,
    counts=token_counts,
    case=A2E,
    versus={"mpi": Versus(MpiA2E, "Alltoall of counts, Alltoallv of rows on an intercommunicator, and NumPy")},
    min_ranks=2,
    dtypes=MOE_DTYPES,
    default_dtype="int8",
)
