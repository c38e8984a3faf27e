"""Floors measured in the same run: a cache line from core to core, and memcpy at the row's size."""

from __future__ import annotations

import numpy as np

from xccl._binding import check, ffi, lib
from xccl.bench.timing import calibrate, calls_block, interleave
from xccl.communicator import Communicator

_ROUNDS = 2000
_LEAST_COPY = 4096  # bytes: a smaller copy's time is that of the call
_PAGE = 4096
_COPY_BLOCKS = 8
_COPY_SECONDS = 0.002


class Floors:
    """What this machine needs at least, with all ranks at work."""

    def __init__(self, comm: Communicator, buffers: int) -> None:
        self.comm = comm
        self.buffers = buffers
        self.line_us = cache_line_us(comm)
        self._known: dict[int, float] = {}

    def copy_us(self, nbytes: int) -> float:
        """Time of a memcpy of `nbytes` on each rank at once, without that of the call. Collective."""
        size = max(nbytes, _LEAST_COPY)
        if size not in self._known:
            self._known[size] = self._copy_us(size)
        return self._known[size] * nbytes / size

    def floor_us(self, nbytes: float) -> float:
        """Least time of moving `nbytes` to each rank: once at memcpy speed, and one cache line. Collective."""
        return (self.line_us or 0.0) + self.copy_us(int(nbytes))

    def _copy_us(self, nbytes: int) -> float:
        """As many pairs of arrays as a row has buffers, so its working set; less the time of a call without bytes."""
        # half a page apart: loads that have the low 12 address bits of a store nearby wait for it (4K aliasing)
        skip = nbytes + _PAGE // 2
        arrays = [np.ones(skip + nbytes, np.uint8) for _ in range(self.buffers)]
        sides = []
        for size in (0, nbytes):
            pairs = [(a[skip : skip + size], a[:size]) for a in arrays]
            sides.append(calls_block(lambda i, pairs=pairs: np.copyto(*pairs[i % len(pairs)])))  # type: ignore[misc]
        repeats = [calibrate(self.comm, block, _COPY_SECONDS) for block in sides]
        empty, full = interleave(self.comm, sides, repeats, _COPY_BLOCKS)
        return max(float(full.min() - empty.min()), 1e-6)


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
