"""reduce_scatter: the sum of an array over all ranks, a part on each rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from xccl.bench.operation import (
    COMMON_SUM_DTYPES,
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

    def call_of(self, x: Array, out: Array) -> Callable[[], object]:
        return partial(self.context.world.Reduce_scatter_block, x, out)


class GlooReduceScatter(ReduceScatter):
    """By reduce_scatter_single, which was reduce_scatter_tensor."""

    is_twin = True

    def call_of(self, x: Array, out: Array) -> Callable[[], object]:
        gloo = self.context.library
        scatter = gloo.function("reduce_scatter_single", "reduce_scatter_tensor")
        return partial(scatter, gloo.tensor(out), gloo.tensor(x))


OPERATION = Operation(
    name="reduce_scatter",
    size="bytes of x on a rank; size / ranks stays on each; the reduction is a sum",
    factor=peers_factor,
    counts=divisible_elements,
    case=ReduceScatter,
    versus={
        "mpi": Versus(MpiReduceScatter, "Reduce_scatter_block", COMMON_SUM_DTYPES),
        "gloo": Versus(GlooReduceScatter, "reduce_scatter_single", COMMON_SUM_DTYPES),
    },
    can_prepare=True,
)
