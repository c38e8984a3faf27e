"""One rank's attachment to the shared object, and the view of a launcher or tool."""

from __future__ import annotations

import os
import sys
import threading
import traceback
import weakref
from types import TracebackType
from typing import Any

import numpy as np

from xccl._binding import check, ffi, lib
from xccl.errors import XcclAborted, XcclUsageError


class World:
    """A rank's mapping of the shared object.

    It is unmapped when the communicators and the last array that lies in it are gone, so an array never dangles.
    With `session` None the object may be of any session: its name was proof enough.
    """

    thread = 0  # that has opened it, see xccl.faults

    def __init__(self, fd: int, rank: int, size: int, session: str | None) -> None:
        out = ffi.new("xccl_world_t **")
        check(lib.xccl_shm_attach(fd, rank, ffi.NULL if session is None else session.encode(), out))
        self._w = out[0]
        self.rank = rank
        self.size = int(lib.xccl_shm_size(self._w))
        if self.size != size:
            raise XcclUsageError(f"rank {rank}: the job has {size} ranks, the world found has {self.size}")
        info = ffi.new("xccl_session_info_t *")
        lib.xccl_shm_session_info(self._w, info)
        self.session = ffi.string(info.session).decode()
        if threading.current_thread() is threading.main_thread():
            lib.xccl_shm_set_interrupt(self._w, lib.xccl_python_interrupted)

    def beside(self, rank: int) -> World:
        """Attaches a further rank, for another thread of this process; both share the mapping."""
        out = ffi.new("xccl_world_t **")
        check(lib.xccl_shm_attach_beside(self._w, rank, out))
        other = object.__new__(World)
        other._w, other.rank, other.size, other.session = out[0], rank, self.size, self.session
        return other

    def wait_all_attached(self) -> None:
        """Returns when every rank has attached; raises XcclTimeout naming those that are missing."""
        check(lib.xccl_shm_wait_all_attached(self._w, lib.XCCL_TIMEOUT_DEFAULT))

    def die_with_creator(self) -> None:
        """Ends this process when the launcher ends, whose child it need not be."""
        check(lib.xccl_shm_die_with_creator(self._w))

    def detach(self) -> None:
        """Leaves the world. Arrays stay readable."""
        lib.xccl_shm_detach(self._w)

    def abort(self, text: str) -> None:
        """Ends the world: every blocked or later call of every rank raises XcclAborted with `text`."""
        lib.xccl_shm_abort(self._w, text.encode(errors="replace"))

    def name_seed(self, error: BaseException) -> None:
        """Adds the seed of a perturbed world to an exception, unless its message has it."""
        _name_seed(self._w, error)

    def array(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        """Array over own memory at `offset`; it keeps the mapping alive."""
        return self.array_at(int(ffi.cast("uintptr_t", lib.xccl_gas_local(self._w, offset))), shape, dtype)

    def array_at(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        """Array over mapped memory at `address`; it keeps the mapping alive."""
        nbytes = dtype.itemsize
        for extent in shape:
            nbytes *= extent
        block = np.asarray(_Block(self, address, max(nbytes, 1)))
        return block[:nbytes].view(dtype).reshape(shape)

    def __del__(self) -> None:
        if hasattr(self, "_w") and lib is not None:  # module globals are gone when the interpreter ends
            lib.xccl_shm_detach(self._w)
            lib.xccl_shm_unmap(self._w)


def _name_seed(handle: Any, error: BaseException) -> None:
    seed = int(lib.xccl_chaos_seed(handle))
    if seed and "XCCL_CHAOS=" not in f"{error}{getattr(error, '__notes__', '')}":
        error.add_note(f"(XCCL_CHAOS={seed})")


class _Block:
    """Bytes of the mapping as NumPy sees them. NumPy keeps this object as the array's base, and it the world."""

    def __init__(self, world: World, address: int, nbytes: int) -> None:
        self.world = world
        self.__array_interface__ = {"version": 3, "shape": (nbytes,), "typestr": "|u1", "data": (address, False)}


class Observer:
    """The control page as a launcher sees it: states of ranks, and the abort flag."""

    def __init__(self, fd: int) -> None:
        out = ffi.new("xccl_world_t **")
        check(lib.xccl_shm_observe(fd, out))
        self._w = out[0]

    def abort(self, text: str) -> None:
        """Ends the world in the launcher's name."""
        lib.xccl_shm_abort(self._w, text.encode(errors="replace"))

    def aborted_by(self) -> tuple[int, str] | None:
        """Rank and message of who ended the world; None while it goes on."""
        rank, text = ffi.new("int *"), ffi.new("char[]", lib.XCCL_ABORT_TEXT_BYTES)
        if not lib.xccl_shm_is_aborted(self._w, rank, text, lib.XCCL_ABORT_TEXT_BYTES):
            return None
        return int(rank[0]), ffi.string(text).decode(errors="replace")

    def pid(self, rank: int) -> int:
        """Process of `rank`, 0 before it has attached."""
        info = ffi.new("xccl_rank_info_t *")
        check(lib.xccl_shm_rank_info(self._w, rank, info))
        return int(info.pid)

    def note_exit(self, rank: int, kind: int, number: int) -> None:
        """Tells the ranks how the process of `rank` ended (an xccl_exit_t and its number)."""
        lib.xccl_shm_note_exit(self._w, rank, kind, number)

    def name_seed(self, error: BaseException) -> None:
        """Adds the seed that the world began with, if it is perturbed and the message names none."""
        _name_seed(self._w, error)

    def describe(self, rank: int) -> str:
        """What `rank` did last: "operation 118 (combine), phase 1"."""
        info = ffi.new("xccl_rank_info_t *")
        check(lib.xccl_shm_rank_info(self._w, rank, info))
        if not info.pid:
            return "before xccl.init"
        name = ffi.string(info.operation).decode()
        return f"operation {info.sequence} ({name}), phase {info.phase}"

    def close(self) -> None:
        """Unmaps the control page."""
        lib.xccl_shm_unmap(self._w)


def abort_on_uncaught(world: World, then_exit: Any = None) -> None:
    """Makes an uncaught exception of this process end the world, so that no peer waits for it.

    `then_exit`, if given, is called afterwards (MPI's abort).
    """
    previous = sys.excepthook
    watched = weakref.ref(world)  # the hook stays for ever, the mapping must not

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        alive = watched()
        if alive is not None:
            alive.name_seed(error)
            alive.abort("".join(traceback.format_exception(kind, error, trace)))
        # The rank that raised shows its traceback; the others only follow.
        if not (isinstance(error, XcclAborted) and "XCCL_LAUNCHER_PID" in os.environ):
            previous(kind, error, trace)
        if then_exit is not None:
            then_exit()

    sys.excepthook = hook
