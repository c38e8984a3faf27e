"""A communicator whose operations are checked for races: what `xccl.init` returns with XCCL_RACECHECK=1."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from xccl._base import CommunicatorBase
from xccl._binding import Call, array_address, check, entry, ffi, lib
from xccl._world import World
from xccl.communicator import Communicator
from xccl.prepared import Prepared

Array = np.ndarray[Any, Any]

_PACKAGE = str(Path(__file__).parent) + os.sep


class CheckedPrepared(Prepared):
    """A prepared operation that runs as the ordinary one does."""

    __slots__ = ("_call", "_comm")

    def __new__(cls, comm: CommunicatorBase, name: str, call: Call, kept: Any) -> CheckedPrepared:
        """As Prepared."""
        made: Any = super().__new__(cls, comm, name, call, kept)
        made._comm, made._call = comm, call
        return made  # type: ignore[no-any-return]

    def __call__(self) -> Any:
        """Runs the operation."""
        return self._comm._run(self._call)


class CheckedCommunicator(Communicator):
    """Tells the C core, before each operation, which line of the program makes it, and what its arrays are.

    The checks themselves are made in the C core. The handle of the fast calls declines all of them, so that every
    operation comes through `_run` or `_handle`.
    """

    _prepared_type = CheckedPrepared

    def __init__(self, world: World, handle: Any, parent: Communicator | None = None) -> None:
        super().__init__(world, handle, parent)
        self._direct = self._entry
        self._entry = entry.Comm(int(ffi.cast("uintptr_t", handle)))
        self._entry.close()
        self._sites: dict[str, int] = {}  # numbers of texts in the C core

    def _handle(self) -> Any:
        handle = super()._handle()
        lib.xccl_race_set_site(self._world._w, self._site(_place()))
        return handle

    def _run(self, call: Call) -> Any:
        code, arguments, result = call
        self._handle()
        return entry.run(self._direct, code, arguments, result)

    def _site(self, text: str) -> int:
        if text not in self._sites:
            out = ffi.new("uint32_t *")
            check(lib.xccl_race_add_site(self._world._w, text.encode(errors="replace"), out))
            self._sites[text] = int(out[0])
        return self._sites[text]

    def empty(
        self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float64, *, timeout: float | None = None
    ) -> Array:
        """As without the checker; the array is described in reports."""
        a = super().empty(shape, dtype, timeout=timeout)
        label = self._site(f"{a.dtype} {list(a.shape)} (made at {_place()})")
        lib.xccl_race_label(self._world._w, _pointer(a), label)
        return a

    def local_read(self, a: Array) -> None:
        """As described in AddressSpace."""
        self._declare(a, False)

    def local_write(self, a: Array) -> None:
        """As described in AddressSpace."""
        self._declare(a, True)

    def _declare(self, a: Array, is_write: bool) -> None:
        handle = self._handle()
        for block in _blocks(a):
            check(lib.xccl_race_declare(handle, _pointer(block), block.nbytes, is_write))


def _place() -> str:
    """File and line of the program that called the package."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_PACKAGE) and frame.f_back is not None:
        frame = frame.f_back
    path = frame.f_code.co_filename
    here = os.path.relpath(path)
    return f"{path if here.startswith(os.pardir) else here}:{frame.f_lineno}"


def _pointer(a: Array) -> Any:
    return ffi.cast("void *", array_address(a))


def _blocks(a: Array) -> Iterator[Array]:
    """The contiguous parts of an array."""
    if a.flags.c_contiguous:
        yield a
    elif a.ndim == 1:
        yield from (a[i : i + 1] for i in range(len(a)))
    else:
        for row in a:
            yield from _blocks(row)
