"""all_to_all: every rank sends a part to every rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from xccl.bench.operation import Array, Operation, Versus, as_bytes, divisible_elements, pattern, peers_factor
from xccl.bench.operations.exchange import Exchange


class AllToAll(Exchange):
    """By `comm.all_to_all`."""

    method = "all_to_all"

    def pair(self, buffer: int) -> tuple[Array, Array]:
        rank, size, dtype = self.comm.rank, self.comm.size, self.context.dtype
        part = self.count // size
        arriving = [pattern(peer, buffer, part, dtype, rank * part) for peer in range(size)]
        return self.source(pattern(rank, buffer, self.count, dtype)), self.receive(np.concatenate(arriving))


class MpiAllToAll(AllToAll):
    """By Alltoall."""

    is_twin = True

    def call_of(self, x: Array, out: Array) -> Callable[[], object]:
        return partial(self.context.world.Alltoall, as_bytes(x), as_bytes(out))


class GlooAllToAll(AllToAll):
    """By all_to_all_single."""

    is_twin = True

    def call_of(self, x: Array, out: Array) -> Callable[[], object]:
        gloo = self.context.library
        return partial(gloo.distributed.all_to_all_single, gloo.tensor(as_bytes(out)), gloo.tensor(as_bytes(x)))


OPERATION = Operation(
    name="all_to_all",
    size="bytes of x on a rank, all peers together: size / ranks goes to each",
    factor=peers_factor,
    counts=divisible_elements,
    case=AllToAll,
    versus={"mpi": Versus(MpiAllToAll, "Alltoall"), "gloo": Versus(GlooAllToAll, "all_to_all_single")},
    can_prepare=True,
)
