"""all_to_all_v: every rank sends a part to every rank, and the parts differ in length."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from xccl.bench.operation import Array, Case, Operation, Versus, as_bytes, elements, pattern, unit_factor


def uneven_counts(count: int, ranks: int) -> NDArray[np.int64]:
    """Elements [from, to]: half, all or one and a half of count / ranks; where parts are small, also none."""
    source, target = np.indices((ranks, ranks))
    return np.asarray(count * (1 + (source + 2 * target) % 3) // (2 * ranks), dtype=np.int64)


class AllToAllV(Case):
    """By `comm.all_to_all_v`, the received counts given."""

    def prepare(self) -> None:
        rank, size, dtype = self.comm.rank, self.comm.size, self.context.dtype
        counts = uneven_counts(self.count, size)
        starts = np.cumsum(counts, axis=1) - counts
        self.send_counts, self.recv_counts = counts[rank].copy(), counts[:, rank].copy()
        longest = int(max(counts.sum(axis=0).max(), counts.sum(axis=1).max()))
        self.nbytes = longest * dtype.itemsize
        pairs = []
        for buffer in range(self.buffers):
            arriving = [
                pattern(peer, buffer, int(counts[peer, rank]), dtype, int(starts[peer, rank])) for peer in range(size)
            ]
            # ranks have different lengths, but symmetric arrays have one: that of the longest
            x = self.source(pattern(rank, buffer, longest, dtype))[: self.send_counts.sum()]
            whole = self.context.empty(longest, self.in_symmetric_memory)
            out = whole[: self.recv_counts.sum()]
            self.results.append((out, np.concatenate(arriving)))
            pairs.append((x, out))

        self.ready = [self.call_of(x, out) for x, out in pairs]

    def call_of(self, x: Array, out: Array) -> Callable[[], object]:
        """The call on one set of arrays; a twin has its own."""
        return self.call("all_to_all_v", x, self.send_counts, self.recv_counts, out=out)

    def run(self, i: int) -> None:
        self.ready[i % self.buffers]()


class MpiAllToAllV(AllToAllV):
    """By Alltoallv."""

    is_twin = True

    def call_of(self, x: Array, out: Array) -> Callable[[], object]:
        width, byte = self.context.dtype.itemsize, self.context.mpi.BYTE
        messages = []
        for a, counts in ((x, self.send_counts * width), (out, self.recv_counts * width)):
            messages.append([as_bytes(a), counts, np.cumsum(counts) - counts, byte])
        return partial(self.context.world.Alltoallv, *messages)


class GlooAllToAllV(AllToAllV):
    """By all_to_all_single with split sizes."""

    is_twin = True

    def call_of(self, x: Array, out: Array) -> Callable[[], object]:
        width, gloo = self.context.dtype.itemsize, self.context.library
        splits = [(counts * width).tolist() for counts in (self.recv_counts, self.send_counts)]
        tensors = [gloo.tensor(as_bytes(a)) for a in (out, x)]
        return partial(gloo.distributed.all_to_all_single, *tensors, *splits)


OPERATION = Operation(
    name="all_to_all_v",
    size="bytes that the busiest rank sends or receives; parts are 0.5, 1 or 1.5 times the mean",
    factor=unit_factor,
    counts=elements,
    case=AllToAllV,
    versus={
        "mpi": Versus(MpiAllToAllV, "Alltoallv"),
        "gloo": Versus(GlooAllToAllV, "all_to_all_single with split sizes"),
    },
)
