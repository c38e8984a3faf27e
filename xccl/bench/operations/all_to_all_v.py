"""all_to_all_v: every rank sends a part to every rank, and the parts differ in length."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xccl.bench.operation import Case, Operation, Versus, as_bytes, elements, pattern, unit_factor


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
        self.pairs = []
        for buffer in range(self.buffers):
            arriving = [
                pattern(peer, buffer, int(counts[peer, rank]), dtype, int(starts[peer, rank])) for peer in range(size)
            ]
            # ranks have different lengths, but symmetric arrays have one: that of the longest
            x = self.source(pattern(rank, buffer, longest, dtype))[: self.send_counts.sum()]
            whole = self.context.empty(longest, self.in_symmetric_memory)
            out = whole[: self.recv_counts.sum()]
            self.results.append((out, np.concatenate(arriving)))
            self.pairs.append((x, out))

    def run(self, i: int) -> None:
        x, out = self.pairs[i % self.buffers]
        self.comm.all_to_all_v(x, self.send_counts, self.recv_counts, out=out)


class MpiAllToAllV(AllToAllV):
    """By Alltoallv."""

    is_twin = True

    def prepare(self) -> None:
        super().prepare()
        width = self.context.dtype.itemsize
        send, receive = self.send_counts * width, self.recv_counts * width
        layouts = [(counts, np.cumsum(counts) - counts) for counts in (send, receive)]
        byte = self.context.mpi.BYTE
        self.messages = [
            tuple([as_bytes(a), *layout, byte] for a, layout in zip(pair, layouts, strict=True)) for pair in self.pairs
        ]

    def run(self, i: int) -> None:
        self.context.world.Alltoallv(*self.messages[i % self.buffers])


OPERATION = Operation(
    name="all_to_all_v",
    size="bytes that the busiest rank sends or receives; parts are 0.5, 1 or 1.5 times the mean",
    factor=unit_factor,
    counts=elements,
    case=AllToAllV,
    versus={"mpi": Versus(MpiAllToAllV, "Alltoallv")},
)
