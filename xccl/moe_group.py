"""What groups of ranks that move rows of MoE share: whether they can be used, and checks of arrays."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xccl._binding import array_address, ffi, readable, writable
from xccl.communicator import Communicator
from xccl.errors import XcclUsageError
from xccl.row_pool import RowPool

Array = np.ndarray[Any, Any]

INT8 = np.dtype(np.int8)
_INT64 = np.dtype(np.int64)
_FLOAT32 = np.dtype(np.float32)

_POINTER, _INT64_POINTER, _FLOAT_POINTER = (ffi.typeof(name) for name in ("void *", "int64_t *", "float *"))
_INT32S, _FLOATS = ffi.typeof("int32_t[]"), ffi.typeof("float[]")


class MoeGroup:
    """An open group as the C core knows it. Errors name operation and rank."""

    comm: Communicator
    hidden: int
    num_topk: int
    dtype: np.dtype[Any]
    _c: Any  # None, or nothing, once closed
    _failure: str

    def _group(self, operation: str) -> Any:
        """The C group; raises if it cannot be used any more."""
        self.comm._handle()
        if not self._c:
            raise self._error(operation, f"this {type(self).__name__} is closed")
        if self._failure:
            raise self._error(operation, f"unusable since {self._failure}: make a new one on all ranks")
        return self._c

    def _fail(self, operation: str, error: BaseException) -> None:
        """A peer may wait for what this rank did not finish: no later operation can be trusted."""
        self._failure = f"{operation} failed halfway ({type(error).__name__})"

    def _error(self, operation: str, text: str) -> XcclUsageError:
        return XcclUsageError(f"{operation} on rank {self.comm.rank}: {text}")

    def _rows(
        self, operation: str, name: str, a: Array, dtype: np.dtype[Any] | None = None, *, write: bool = False
    ) -> Any:
        """Pointer to rows of `hidden` elements."""
        address = (writable if write else readable)(a, name, f"{operation} on rank {self.comm.rank}")
        expected = dtype or self.dtype
        if a.ndim != 2 or a.shape[1] != self.hidden or a.dtype != expected:
            raise self._error(operation, f"{name} is {kind_of(a)}, expected {expected} [rows, {self.hidden}]")
        return address

    def _slots(self, operation: str, name: str, a: Array, num_tokens: int, dtype: np.dtype[Any]) -> Any:
        """Pointer to one number for each token and expert slot."""
        address = readable(a, name, f"{operation} on rank {self.comm.rank}")
        if a.shape != (num_tokens, self.num_topk) or a.dtype != dtype:
            expected = f"{dtype} [{num_tokens}, {self.num_topk}]"
            raise self._error(operation, f"{name} is {kind_of(a)}, expected {expected} [num_tokens, num_topk]")
        return ffi.cast(_INT64_POINTER if dtype == _INT64 else _FLOAT_POINTER, address)

    def _weights(self, operation: str, a: Array | None, num_tokens: int) -> Any:
        if a is None:
            return ffi.NULL
        return self._slots(operation, "topk_weights", a, num_tokens, _FLOAT32)

    def _room(self, operation: str, num_rows: int, out: Array | None, dequantize: bool, pool: RowPool) -> Arrival:
        """Where received rows go: the beginning of `out`, or rows of the pool."""
        if out is None:
            x = pool.empty((num_rows, self.hidden), self.dtype if dequantize else INT8)
        elif out.shape[0] >= num_rows:
            x = out[:num_rows]
        else:
            raise self._error(operation, f"out has {out.shape[0]} rows, this rank received {num_rows}")
        return Arrival(x, None if dequantize else np.empty(num_rows, np.float32), np.empty((2, num_rows), np.int32))

    def _outputs(self, operation: str, y: Array, num_recv: int) -> None:
        """y may have distant rows, but each must be contiguous."""
        if not isinstance(y, np.ndarray):
            raise self._error(operation, f"y must be a NumPy array, got {type(y).__name__}")
        if y.shape != (num_recv, self.hidden) or y.dtype != self.dtype:
            raise self._error(operation, f"y is {kind_of(y)}, expected {self.dtype} [{num_recv}, {self.hidden}]")
        contiguous = y.strides[1] == y.itemsize or self.hidden == 1
        ascending = y.strides[0] >= self.hidden * y.itemsize or num_recv == 1
        if num_recv > 0 and not (contiguous and ascending):
            raise self._error(
                operation,
                f"rows of y must be contiguous and ascending, got strides {y.strides}: pass "
                "numpy.ascontiguousarray(...) of it (nothing is copied silently)",
            )


@dataclass
class Arrival:
    """Where received rows go, as the C core takes it, and what the caller gets of them."""

    x: Array
    scales: NDArray[np.float32] | None
    sources: NDArray[np.int32]  # [2, num_rows]: rank, token

    def pointers(self, operation: str) -> tuple[Any, Any, Any, Any]:
        """Of x, scales, source ranks, source tokens."""
        src_rank = ffi.from_buffer(_INT32S, self.sources)
        scales = ffi.NULL if self.scales is None else ffi.from_buffer(_FLOATS, self.scales)
        return writable(self.x, "out", operation), scales, src_rank, src_rank + self.sources.shape[1]

    def rows(self) -> Any:
        """The rows, or int8 rows and their scales."""
        return self.x if self.scales is None else (self.x, self.scales)


def start_of(y: Array) -> tuple[Any, int]:
    """Pointer to the first row, and bytes from row to row, also where rows are apart."""
    stride = y.strides[0] if y.shape[0] > 1 else y.nbytes
    if y.flags.c_contiguous:
        return readable(y, "y", "outputs"), stride
    return ffi.cast(_POINTER, array_address(y)), stride


def time_left(timeout: float | None, started: float) -> float | None:
    """What is left of a call's timeout for its second half."""
    return None if timeout is None else max(0.0, timeout - (time.monotonic() - started))


def kind_of(a: Array) -> str:
    """An array in words: dtype and shape."""
    return f"{a.dtype} {list(a.shape)}"
