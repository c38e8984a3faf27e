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
    """A pair over MPI's one-sided operations: what the peer writes or reads lies in a window.

    Attributes
    ----------
    head : int
        Bytes of the window before those of the first set.
    exposed, at : list
        This rank's bytes in the window and their place in it, for each set.
    """

    is_twin = True
    head = 0

    def prepare(self) -> None:
        super().prepare()
        mpi, width = self.context.mpi, self.nbytes
        self.at = [self.head + buffer * width for buffer in range(self.buffers)]
        nbytes = self.head + width * self.buffers
        self.window = mpi.Win.Allocate(nbytes, comm=self.context.world)
        self.window.Lock_all()
        # all are through with it then: a rank that waits in xccl does nothing for the others' MPI
        self.context.world.Barrier()
        memory = np.frombuffer(self.window.tomemory(), np.uint8, nbytes)
        self.exposed = [memory[at : at + width] for at in self.at]

    def expect_in_window(self) -> None:
        """What is to arrive will be in the window."""
        arriving = [expected for _, expected in self.results]
        self.results[:] = [(own.view(a.dtype), a) for own, a in zip(self.exposed, arriving, strict=False)]

    def close(self) -> None:
        self.results.clear()
        self.exposed.clear()
        self.window.Unlock_all()
        self.window.Free()
