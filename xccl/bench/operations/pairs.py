"""What operations between two ranks share."""

from __future__ import annotations

import numpy as np

from xccl.bench.operation import Array, Case, as_bytes, pattern


class PairCase(Case):
    """Ranks 0 and 1, 2 and 3, ... work in pairs; the last of an odd number has no peer and does nothing.

    Attributes
    ----------
    pairs : list of (array, array)
        What this rank sends and where it receives, for each set; as bytes for MPI.
    symmetric_source, symmetric_out : bool
        True if the operation needs it so.
    """

    symmetric_source = False
    symmetric_out = False

    def prepare(self) -> None:
        rank, dtype = self.comm.rank, self.context.dtype
        self.peer = rank ^ 1
        self.idle = self.peer >= self.comm.size
        self.first = rank < self.peer
        self.pairs: list[tuple[Array, Array]] = []
        for buffer in range(self.buffers):
            x = self.source(pattern(rank, buffer, self.count, dtype), symmetric=self.symmetric_source)
            out = self.receive(pattern(self.peer, buffer, self.count, dtype), symmetric=self.symmetric_out)
            self.pairs.append((as_bytes(x), as_bytes(out)) if self.is_twin else (x, out))
        if self.idle:
            self.results.clear()


class WindowCase(PairCase):
    """A pair over MPI's one-sided operations: what the peer writes or reads lies in a window."""

    is_twin = True

    def prepare(self) -> None:
        super().prepare()
        mpi, width = self.context.mpi, self.nbytes
        self.window = mpi.Win.Allocate(width * self.buffers, comm=self.context.world)
        self.window.Lock_all()
        memory = np.frombuffer(self.window.tomemory(), np.uint8, width * self.buffers)
        self.exposed = [memory[buffer * width : (buffer + 1) * width] for buffer in range(self.buffers)]

    def close(self) -> None:
        self.results.clear()
        self.exposed.clear()
        self.window.Unlock_all()
        self.window.Free()
