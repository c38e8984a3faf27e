"""ma_layer: A2E and E2A, as in a layer whose experts take no time."""

from __future__ import annotations

from xccl.bench.operation import Operation, Versus, unit_factor
from xccl.bench.operations.attention_case import AttentionCase, MpiAttentionCase
from xccl.bench.operations.moe_case import MOE_DTYPES, token_counts


class MaLayer(AttentionCase):
    """By `ae.a2e`, `ae.a2e_recv`, `ae.e2a_send` and `ae.e2a`."""

    dispatches = True
    combines = True

    def run(self, i: int) -> None:
        self.go_out(i % self.buffers)
        self.come_back()


class MpiMaLayer(MpiAttentionCase, MaLayer):
    """By the twin: Alltoall of counts, Alltoallv of rows each way on an intercommunicator, and NumPy."""


OPERATION = Operation(
    name="ma_layer",
    size="bytes of rows to the busiest expert rank, once a token, and of outputs to the busiest attention rank",
    factor=unit_factor,
    counts=token_counts,
    case=MaLayer,
    versus={
        "mpi": Versus(MpiMaLayer, "Alltoall of counts, Alltoallv of rows each way on an intercommunicator, and NumPy")
    },
    min_ranks=2,
    dtypes=MOE_DTYPES,
    default_dtype="int8",
)
