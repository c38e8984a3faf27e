"""The seam between Python and the C core: errors, timeouts and addresses of arrays.

Layers above call `lib` functions through `check` and never look at status codes themselves.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from xccl import errors
from xccl._core import ffi, lib

__all__ = ["array_address", "check", "ffi", "lib", "readable", "timeout_ns", "writable"]

_ERRORS: dict[int, type[errors.XcclError]] = {
    lib.XCCL_ERR_USAGE: errors.XcclUsageError,
    lib.XCCL_ERR_TIMEOUT: errors.XcclTimeout,
    lib.XCCL_ERR_PEER_LOST: errors.XcclPeerLost,
    lib.XCCL_ERR_ABORTED: errors.XcclAborted,
    lib.XCCL_ERR_MEMORY: errors.XcclOutOfMemory,
    lib.XCCL_ERR_SYSTEM: errors.XcclSystemError,
}

_CHARS = ffi.typeof("char[]")

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
    raise _ERRORS.get(status, errors.XcclError)(message)


def timeout_ns(timeout: float | None) -> int:
    """Nanoseconds for the C core from seconds; None is the configured default, infinity no deadline."""
    if timeout is None:
        return int(lib.XCCL_TIMEOUT_DEFAULT)
    if math.isnan(timeout) or timeout < 0:
        raise errors.XcclUsageError(f"timeout= is a number of seconds >= 0 (or None for the default), got {timeout!r}")
    return min(int(timeout * 1e9), (1 << 63) - 1) if math.isfinite(timeout) else (1 << 63) - 1


def array_address(a: np.ndarray[Any, Any]) -> int:
    """Address of the first element."""
    return int(a.__array_interface__["data"][0])


def readable(a: np.ndarray[Any, Any], name: str, operation: str) -> Any:
    """Pointer (char *) to `a` after checking that the C core can read it as one contiguous block."""
    return _pointer(a, name, operation, False)


def writable(a: np.ndarray[Any, Any], name: str, operation: str) -> Any:
    """Pointer (char *) to `a` after checking that the C core can write it as one contiguous block."""
    return _pointer(a, name, operation, True)


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
