"""Floors measured in the same run: a cache line from core to core, and memcpy at the row's size."""

from __future__ import annotations

import numpy as np

from xccl._binding import check, ffi, lib
from xccl.bench.timing import calibrate, calls_block, interleave
from xccl.communicator import Communicator

_ROUNDS = 2000
_LEAST_COPY = 4096  # bytes: a smaller copy's time is that of the call
_PAGE = 4096
_COPY_BLOCKS = 5
_COPY_SECONDS = 0.004


class Floors:
    """What this machine needs at least, with all ranks at work."""

    def __init__(self, comm: Communicator, buffers: int) -> None:
        self.comm = comm
        self.buffers = buffers
        self.line_us = cache_line_us(comm)
        self._empty_us = self._copy_us(1)
        self._known: dict[int, float] = {}

    def copy_us(self, nbytes: int) -> float:
        """Time of a memcpy of `nbytes` on each rank at once, without that of the call. Collective."""
        size = max(nbytes, _LEAST_COPY)
        if size not in self._known:
            self._known[size] = max(self._copy_us(size) - self._empty_us, 1e-6)
        return self._known[size] * nbytes / size

    def floor_us(self, nbytes: float) -> float:
        """Least time of moving `nbytes` to each rank: once at memcpy speed, and one cache line. Collective."""
        return (self.line_us or 0.0) + self.copy_us(int(nbytes))

    def _copy_us(self, nbytes: int) -> float:
        """The working set is that of a row: as many pairs of arrays as it has buffers."""
        # half a page apart: loads that have the low 12 address bits of a store nearby wait for it (4K aliasing)
        skip = nbytes + _PAGE // 2
        arrays = [np.ones(skip + nbytes, np.uint8) for _ in range(self.buffers)]
        pairs = [(a[skip:], a[:nbytes]) for a in arrays]
        block = calls_block(lambda i: np.copyto(*pairs[i % len(pairs)]))
        repeats = calibrate(self.comm, block, _COPY_SECONDS)
        return float(interleave(self.comm, [block], [repeats], _COPY_BLOCKS)[0].min())


def cache_line_us(comm: Communicator) -> float | None:
    """One way of a cache line between ranks 0 and 1 while the others sleep; None for a rank alone. Collective."""
    if comm.size < 2:
        return None
    signal, elapsed, best = comm.signal(), ffi.new("uint64_t *"), float("inf")
    for _ in range(5):
        comm.barrier()
        if comm.rank < 2:
            check(lib.xccl_gas_bounce(comm._handle(), signal.pointer, 1 - comm.rank, _ROUNDS, int(10e9), elapsed))
            best = min(best, elapsed[0] / (2 * _ROUNDS) / 1e3)
    result = comm.broadcast(np.array([best]), 0)
    comm.free(signal)
    return float(result[0])
