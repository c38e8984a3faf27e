"""all_reduce: the sum of an array over all ranks, on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from xccl.bench.operation import (
    COMMON_SUM_DTYPES,
    Array,
    Operation,
    Versus,
    all_reduce_factor,
    elements,
    pattern,
    pattern_sum,
)
from xccl.bench.operations.exchange import Exchange


class AllReduce(Exchange):
    """By `comm.all_reduce`."""

    method = "all_reduce"

    def pair(self, buffer: int) -> tuple[Array, Array]:
        size, dtype = self.comm.size, self.context.dtype
        x = self.source(pattern(self.comm.rank, buffer, self.count, dtype))
        return x, self.receive(pattern_sum(size, buffer, self.count, dtype))


class MpiAllReduce(AllReduce):
    """By Allreduce."""

    is_twin = True

    def call_of(self, x: Array, out: Array) -> Callable[[], object]:
        return partial(self.context.world.Allreduce, x, out)


class GlooAllReduce(AllReduce):
    """By all_reduce, which works in place: a copy comes before it."""

    is_twin = True

    def call_of(self, x: Array, out: Array) -> Callable[[], object]:
        gloo = self.context.library
        return partial(_copy_and_reduce, gloo.distributed.all_reduce, gloo.tensor(x), gloo.tensor(out))


def _copy_and_reduce(all_reduce: Callable[[Any], object], x: Any, out: Any) -> None:
    out.copy_(x)
    all_reduce(out)


OPERATION = Operation(
    name="all_reduce",
    size="bytes of the array on a rank; the reduction is a sum",
    factor=all_reduce_factor,
    counts=elements,
    case=AllReduce,
    versus={
        "mpi": Versus(MpiAllReduce, "Allreduce", COMMON_SUM_DTYPES),
        "gloo": Versus(GlooAllReduce, "a copy and all_reduce in place", COMMON_SUM_DTYPES),
    },
    can_prepare=True,
)
