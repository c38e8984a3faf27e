"""all_gather: an array of each rank to all ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from xccl.bench.operation import Array, Operation, Versus, as_bytes, divisible_elements, pattern, peers_factor
from xccl.bench.operations.exchange import Exchange


class AllGather(Exchange):
    """By `comm.all_gather`."""

    method = "all_gather"

    def pair(self, buffer: int) -> tuple[Array, Array]:
        size, dtype = self.comm.size, self.context.dtype
        part = self.count // size
        parts = [pattern(peer, buffer, part, dtype) for peer in range(size)]
        out = self.receive(np.concatenate(parts))
        return self.source(parts[self.comm.rank]), out.reshape(size, part)


class MpiAllGather(AllGather):
    """By Allgather."""

    is_twin = True

    def call_of(self, x: Array, out: Array) -> Callable[[], object]:
        return partial(self.context.world.Allgather, as_bytes(x), as_bytes(out))


class GlooAllGather(AllGather):
    """By all_gather_single, which was all_gather_into_tensor."""

    is_twin = True

    def call_of(self, x: Array, out: Array) -> Callable[[], object]:
        gloo = self.context.library
        gather = gloo.function("all_gather_single", "all_gather_into_tensor")
        return partial(gather, gloo.tensor(as_bytes(out)), gloo.tensor(as_bytes(x)))


OPERATION = Operation(
    name="all_gather",
    size="bytes of the result on a rank; each rank gives size / ranks",
    factor=peers_factor,
    counts=divisible_elements,
    case=AllGather,
    versus={"mpi": Versus(MpiAllGather, "Allgather"), "gloo": Versus(GlooAllGather, "all_gather_single")},
    can_prepare=True,
)
