"""The seam between Python and the C core: errors, timeouts and addresses of arrays.

Layers above call `lib` functions through `check` and never look at status codes themselves. The calls that must be
fast go through `entry` instead, the hand-written module of csrc/python/entry.c.
"""

from __future__ import annotations

import importlib.util
import math
import operator
import time
from types import ModuleType
from typing import Any

import numpy as np

from xccl import errors
from xccl._core import __file__ as _core_file
from xccl._core import ffi, lib

__all__ = [
    "RANK_STATES",
    "Call",
    "address_to_read",
    "address_to_write",
    "array_address",
    "check",
    "entry",
    "ffi",
    "integer",
    "lib",
    "readable",
    "timeout_ns",
    "writable",
]


def _load_entry() -> ModuleType:
    """The module xccl._entry, which is in the same shared object as xccl._core: both use one C core."""
    spec = importlib.util.spec_from_file_location("xccl._entry", _core_file)
    if spec is None or spec.loader is None:
        raise ImportError(f"xccl: {_core_file} is not an extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_CHARS = ffi.typeof("char[]")

entry: Any = _load_entry()

# A call that is ready to be made: its code in `entry`, its arguments as numbers, and what the operation returns.
Call = tuple[int, tuple[int, ...], Any]

_ERRORS: dict[int, type[errors.XcclError]] = {
    lib.XCCL_ERR_USAGE: errors.XcclUsageError,
    lib.XCCL_ERR_TIMEOUT: errors.XcclTimeout,
    lib.XCCL_ERR_PEER_LOST: errors.XcclPeerLost,
    lib.XCCL_ERR_ABORTED: errors.XcclAborted,
    lib.XCCL_ERR_MEMORY: errors.XcclOutOfMemory,
    lib.XCCL_ERR_SYSTEM: errors.XcclSystemError,
    lib.XCCL_ERR_RACE: errors.XcclRaceError,
    lib.XCCL_ERR_INJECTED: errors.XcclInjected,
    lib.XCCL_ERR_MISSING: errors.XcclMissingExperts,
}

_pending_interrupt: list[BaseException] = []


def _note_interrupt(kind: type[BaseException], error: BaseException, trace: Any) -> int:
    _pending_interrupt.append(error)
    return 1


@ffi.def_extern(onerror=_note_interrupt)  # type: ignore[untyped-decorator]
def xccl_python_interrupted() -> int:
    """Runs between sleeps of a waiting rank: entering Python lets its signal handlers (Ctrl-C) run."""
    return 0


def check(status: int) -> None:
    """Raises the exception that belongs to a negative status, with the C core's message."""
    if status >= 0:
        return
    if status == lib.XCCL_ERR_INTERRUPTED and _pending_interrupt:
        raise _pending_interrupt.pop()
    message = ffi.string(lib.xccl_error_message()).decode(errors="replace")
    if status == lib.XCCL_ERR_ABORTED:
        raise errors.XcclAborted(message, int(lib.xccl_error_rank()), message.partition("\n")[2] or message)
    if status == lib.XCCL_ERR_TIMEOUT:
        raise errors.XcclTimeout(message, _missing())
    if status == lib.XCCL_ERR_PEER_LOST and lib.xccl_error_rank() >= 0:
        lost = ffi.new("xccl_rank_info_t *")
        lib.xccl_error_lost(lost)
        cause = ffi.string(lost.cause).decode()
        raise errors.XcclPeerLost(message, int(lib.xccl_error_rank()), int(lost.pid), cause)
    raise _ERRORS.get(status, errors.XcclError)(message)


# A rank's state in words, for errors and tools.
RANK_STATES = {
    lib.XCCL_RANK_ABSENT: "absent",
    lib.XCCL_RANK_ATTACHED: "alive",
    lib.XCCL_RANK_CLOSED: "left",
    lib.XCCL_RANK_DEAD: "dead",
    lib.XCCL_RANK_STOPPED: "stopped",
}


def _missing() -> tuple[errors.Missing, ...]:
    """What this thread's last wait still lacked."""
    slot = ffi.new("xccl_missing_t *")
    found: list[errors.Missing] = []
    now = time.monotonic()
    while lib.xccl_error_missing(len(found), slot) == lib.XCCL_OK:
        place = (int(slot.rank), ffi.string(slot.what).decode(), int(slot.expected), int(slot.seen))
        if slot.rank < 0:
            found.append(errors.Missing(*place))
            continue
        info = slot.info
        found.append(
            errors.Missing(
                *place,
                state=RANK_STATES[info.state],
                operation=ffi.string(info.operation).decode(),
                sequence=int(info.sequence),
                phase=int(info.phase),
                idle=max(now - info.moved_ns * 1e-9, 0.0) if info.moved_ns else 0.0,
            )
        )
    return tuple(found)


def timeout_ns(timeout: float | None) -> int:
    """Nanoseconds for the C core from seconds; None is the configured default, infinity no deadline."""
    if timeout is None:
        return int(lib.XCCL_TIMEOUT_DEFAULT)
    if math.isnan(timeout) or timeout < 0:
        raise errors.XcclUsageError(f"timeout= is a number of seconds >= 0 (or None for the default), got {timeout!r}")
    return min(int(timeout * 1e9), (1 << 63) - 1) if math.isfinite(timeout) else (1 << 63) - 1


def integer(value: int, name: str, operation: str, *, bits: int = 32) -> int:
    """A Python integer that fits a signed C integer of `bits` bits, from anything that is one."""
    try:
        number = operator.index(value)
    except TypeError:
        raise errors.XcclUsageError(f"{operation}: {name} must be an integer, got {type(value).__name__}") from None
    if abs(number) >= 1 << (bits - 1):
        raise errors.XcclUsageError(f"{operation}: {name} is too large, got {number}")
    return number


def array_address(a: np.ndarray[Any, Any]) -> int:
    """Address of the first element."""
    return int(a.__array_interface__["data"][0])


def readable(a: np.ndarray[Any, Any], name: str, operation: str) -> Any:
    """Pointer (char *) to `a` after checking that the C core can read it as one contiguous block."""
    return _pointer(a, name, operation, False)


def writable(a: np.ndarray[Any, Any], name: str, operation: str) -> Any:
    """Pointer (char *) to `a` after checking that the C core can write it as one contiguous block."""
    return _pointer(a, name, operation, True)


def address_to_read(a: np.ndarray[Any, Any], name: str, operation: str) -> int:
    """As `readable`, as a number."""
    _require_block(a, name, operation, False)
    return array_address(a)


def address_to_write(a: np.ndarray[Any, Any], name: str, operation: str) -> int:
    """As `writable`, as a number."""
    _require_block(a, name, operation, True)
    return array_address(a)


def _pointer(a: np.ndarray[Any, Any], name: str, operation: str, write: bool) -> Any:
    if isinstance(a, np.ndarray) and not a.dtype.hasobject:
        # The buffer protocol checks what is needed, and is five times as fast as asking for each property.
        try:
            return ffi.from_buffer(_CHARS, a, write)
        except (BufferError, ValueError):
            pass  # a real fault, or a dtype without that protocol (bfloat16, datetime64)
    _require_block(a, name, operation, write)
    if a.ndim:
        return ffi.from_buffer(_CHARS, a.view(np.uint8), write)
    return ffi.cast("char *", array_address(a))


def _require_block(a: np.ndarray[Any, Any], name: str, operation: str, write: bool) -> None:
    """Raises XcclUsageError with the reason why the C core cannot use `a`."""
    if not isinstance(a, np.ndarray):
        raise errors.XcclUsageError(f"{operation}: {name} must be a NumPy array, got {type(a).__name__}")
    if not a.flags.c_contiguous:
        raise errors.XcclUsageError(
            f"{operation}: {name} must be C-contiguous, got shape {a.shape} with strides {a.strides}: "
            "pass numpy.ascontiguousarray(...) of it (nothing is copied silently)"
        )
    if a.dtype.hasobject:
        raise errors.XcclUsageError(f"{operation}: {name} has dtype {a.dtype}: Python objects cannot be shared")
    if write and not a.flags.writeable:
        raise errors.XcclUsageError(f"{operation}: {name} is read-only")
