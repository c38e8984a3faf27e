"""Recycled rows in a rank's own window, which its peers can read in place."""

from __future__ import annotations

import weakref
from bisect import insort
from typing import Any

import numpy as np

from xccl._binding import check, ffi, lib
from xccl._world import World
from xccl.errors import XcclOutOfMemory

Array = np.ndarray[Any, Any]

_ALIGNMENT = 64  # bytes: a cache line
_GROWTH = 1 << 20  # bytes of pages reserved at a time: fewer system calls while the high-water mark rises


class RowPool:
    """Hands out arrays from a range of the own window; an array's memory comes back when it is garbage-collected.

    The lowest free place is taken, so that steady use stays on pages that have been touched before.
    """

    def __init__(self, world: World, offset: int, nbytes: int) -> None:
        self._world = world
        self._offset = offset
        self._nbytes = nbytes
        self._reserved = 0  # bytes from the start that have pages
        self._start = ffi.cast("char *", lib.xccl_gas_local(world._w, offset))
        self._keep = lambda _: world
        # (start, end, weak reference to the block, which is the base of all views) of arrays, sorted
        self._used: list[tuple[int, int, weakref.ref[Any]]] = []

    def empty(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> Array:
        """An array of undefined content; an ordinary one when the pool or shared memory is used up."""
        nbytes = shape[0] * shape[1] * dtype.itemsize
        if nbytes == 0:
            return np.empty(shape, dtype)
        self._collect()
        start = self._find(nbytes)
        end = start + nbytes
        if end > self._nbytes or not self._reserve(end):
            return np.empty(shape, dtype)
        block = ffi.buffer(ffi.gc(self._start + start, self._keep), nbytes)  # keeps the mapping
        insort(self._used, (start, end, weakref.ref(block)))
        return np.ndarray(shape, dtype, block)

    @property
    def live(self) -> int:
        """Number of arrays that are still referenced."""
        self._collect()
        return len(self._used)

    def _collect(self) -> None:
        self._used = [place for place in self._used if place[2]() is not None]

    def _find(self, nbytes: int) -> int:
        start = 0
        for begin, end, _ in self._used:
            if start + nbytes <= begin:
                break
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
        return start

    def _reserve(self, nbytes: int) -> bool:
        if nbytes <= self._reserved:
            return True
        wanted = min(-(-nbytes // _GROWTH) * _GROWTH, self._nbytes)
        try:
            check(lib.xccl_heap_commit(self._world._w, self._offset + self._reserved, wanted - self._reserved))
        except XcclOutOfMemory:
            return False
        self._reserved = wanted
        return True
