"""Collectives: operations in which all ranks of a communicator take part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from xccl._base import CommunicatorBase
from xccl._binding import (
    Call,
    address_to_read,
    address_to_write,
    array_address,
    check,
    entry,
    ffi,
    lib,
    readable,
    timeout_ns,
)
from xccl.errors import XcclUsageError

Array = np.ndarray[Any, Any]
ReduceOp = Literal["sum", "min", "max", "prod"]
Counts = Sequence[int] | NDArray[np.integer[Any]]

_DTYPES: dict[np.dtype[Any], int] = {
    np.dtype(np.float32): lib.XCCL_FLOAT32,
    np.dtype(np.float16): lib.XCCL_FLOAT16,
    np.dtype(ml_dtypes.bfloat16): lib.XCCL_BFLOAT16,
    np.dtype(np.float64): lib.XCCL_FLOAT64,
    np.dtype(np.bool_): lib.XCCL_BOOL,
    np.dtype(np.int8): lib.XCCL_INT8,
    np.dtype(np.int16): lib.XCCL_INT16,
    np.dtype(np.int32): lib.XCCL_INT32,
    np.dtype(np.int64): lib.XCCL_INT64,
    np.dtype(np.uint8): lib.XCCL_UINT8,
    np.dtype(np.uint16): lib.XCCL_UINT16,
    np.dtype(np.uint32): lib.XCCL_UINT32,
    np.dtype(np.uint64): lib.XCCL_UINT64,
    np.dtype(np.complex64): lib.XCCL_COMPLEX64,
    np.dtype(np.complex128): lib.XCCL_COMPLEX128,
}
_REDUCE_OPS: dict[str, int] = {
    "sum": lib.XCCL_SUM,
    "min": lib.XCCL_MIN,
    "max": lib.XCCL_MAX,
    "prod": lib.XCCL_PROD,
}
_NOT_REDUCED = (lib.XCCL_COMPLEX64, lib.XCCL_COMPLEX128, lib.XCCL_BYTES)


class Collectives(CommunicatorBase):
    """Operations in which all ranks of a communicator take part, in the same order.

    All take contiguous arrays. Results are new arrays, or `out=` (right shape and dtype, not overlapping the input
    unless said otherwise), which is returned. Symmetric arrays save a copy: peers read them in place. `timeout=` is in
    seconds, None is the default of `xccl.init`.

    All raise XcclUsageError for a bad argument, before anything is sent; XcclUsageError naming the rank that differs
    if the ranks do not agree on operation, sizes, dtype, reduction or root; XcclTimeout, XcclPeerLost and XcclAborted
    while waiting. After an error found while waiting, the communicator is unusable.
    """

    def barrier(self, *, timeout: float | None = None) -> None:
        """Returns when all ranks have called it; what they wrote before is visible then. Collective."""
        if entry.barrier(self._entry, timeout) is None:
            self._run(self._barrier(timeout=timeout))

    def _barrier(self, *, timeout: float | None = None) -> Call:
        return entry.BARRIER, (timeout_ns(timeout),), None

    def broadcast(self, buf: Array, root: int, *, out: Array | None = None, timeout: float | None = None) -> Array:
        """Copies `buf` of rank `root` to all ranks: into `buf` of the others, or `out` of all. Collective.

        Without `out`, every rank gives a `buf` of equal shape and dtype and gets it back filled. With `out` (which is
        returned), `buf` is not written, and is read on `root` only; the others may pass the same array twice.
        """
        result: Array | None = entry.broadcast(self._entry, buf, root, out, timeout)
        return self._run(self._broadcast(buf, root, out=out, timeout=timeout)) if result is None else result

    def _broadcast(self, buf: Array, root: int, *, out: Array | None = None, timeout: float | None = None) -> Call:
        if not 0 <= root < self.size:
            raise XcclUsageError(f"broadcast: root is a rank from 0 to {self.size - 1}, got {root}")
        if out is None:
            source = target = (address_to_read if self.rank == root else address_to_write)(buf, "buf", "broadcast")
            out = buf
        else:
            source = address_to_read(buf, "buf", "broadcast")
            target = _checked_out(out, buf.shape, buf.dtype, "broadcast")
        code = _dtype_code(buf.dtype)
        return entry.BROADCAST, (source, target, buf.nbytes, code, root, timeout_ns(timeout)), out

    def all_gather(self, x: Array, *, out: Array | None = None, timeout: float | None = None) -> Array:
        """Collects `x` of all ranks, of equal shape and dtype, into `[size, *x.shape]`. Collective.

        `x` may be `out[rank]`.
        """
        result: Array | None = entry.all_gather(self._entry, x, out, timeout)
        return self._run(self._all_gather(x, out=out, timeout=timeout)) if result is None else result

    def _all_gather(self, x: Array, *, out: Array | None = None, timeout: float | None = None) -> Call:
        source = address_to_read(x, "x", "all_gather")
        out, target = _result(out, (self.size, *x.shape), x.dtype, "all_gather")
        code = _dtype_code(x.dtype)
        arguments = (source, target, x.nbytes, code, timeout_ns(timeout))
        return entry.ALL_GATHER, arguments, out

    def all_reduce(
        self, x: Array, op: ReduceOp = "sum", *, out: Array | None = None, timeout: float | None = None
    ) -> Array:
        """Reduces `x` of all ranks element by element; every rank gets the result, of x's shape and dtype. Collective.

        `op` is "sum", "min", "max" or "prod". Elements are reduced over the ranks 0, 1, ... in this order, so the
        result has the same bits on all ranks and on every run. float16 and bfloat16 are accumulated in float32 and
        rounded once; integers wrap; a NaN makes min and max NaN; bool has min and max only. `out` may be `x`.
        """
        result: Array | None = entry.all_reduce(self._entry, x, op, out, timeout)
        return self._run(self._all_reduce(x, op, out=out, timeout=timeout)) if result is None else result

    def _all_reduce(
        self, x: Array, op: ReduceOp = "sum", *, out: Array | None = None, timeout: float | None = None
    ) -> Call:
        source = address_to_read(x, "x", "all_reduce")
        code, reduce_op = _reduction(x.dtype, op, "all_reduce")
        out, target = _result(out, x.shape, x.dtype, "all_reduce")
        arguments = (source, target, x.size, code, reduce_op, timeout_ns(timeout))
        return entry.ALL_REDUCE, arguments, out

    def reduce_scatter(
        self, x: Array, op: ReduceOp = "sum", *, out: Array | None = None, timeout: float | None = None
    ) -> Array:
        """Reduces `x` of all ranks as `all_reduce`; each rank gets its part of axis 0 of the result. Collective.

        x.shape[0] must be divisible by the number of ranks; the result is `[x.shape[0] / size, *x.shape[1:]]`.
        """
        result: Array | None = entry.reduce_scatter(self._entry, x, op, out, timeout)
        return self._run(self._reduce_scatter(x, op, out=out, timeout=timeout)) if result is None else result

    def _reduce_scatter(
        self, x: Array, op: ReduceOp = "sum", *, out: Array | None = None, timeout: float | None = None
    ) -> Call:
        source = address_to_read(x, "x", "reduce_scatter")
        rows = self._rows_per_rank(x, "reduce_scatter")
        code, reduce_op = _reduction(x.dtype, op, "reduce_scatter")
        out, target = _result(out, (rows, *x.shape[1:]), x.dtype, "reduce_scatter")
        arguments = (source, target, out.size, code, reduce_op, timeout_ns(timeout))
        return entry.REDUCE_SCATTER, arguments, out

    def all_to_all(self, x: Array, *, out: Array | None = None, timeout: float | None = None) -> Array:
        """Sends part i of axis 0 of `x` to rank i, and collects what the ranks have for this one. Collective.

        x.shape[0] must be divisible by the number of ranks. The result has x's shape; part i comes from rank i.
        """
        result: Array | None = entry.all_to_all(self._entry, x, out, timeout)
        return self._run(self._all_to_all(x, out=out, timeout=timeout)) if result is None else result

    def _all_to_all(self, x: Array, *, out: Array | None = None, timeout: float | None = None) -> Call:
        source = address_to_read(x, "x", "all_to_all")
        self._rows_per_rank(x, "all_to_all")
        out, target = _result(out, x.shape, x.dtype, "all_to_all")
        code = _dtype_code(x.dtype)
        arguments = (source, target, x.nbytes // self.size, code, timeout_ns(timeout))
        return entry.ALL_TO_ALL, arguments, out

    def all_to_all_v(
        self,
        x: Array,
        send_counts: Counts,
        recv_counts: Counts | None = None,
        *,
        out: Array | None = None,
        timeout: float | None = None,
    ) -> Array:
        """Sends send_counts[i] rows of `x` to rank i, in order, and collects the rows for this rank. Collective.

        Counts are rows of axis 0, one per rank, zero allowed; sum(send_counts) is x.shape[0]. The result is
        `[sum of the received counts, *x.shape[1:]]`, ordered by source rank. Without `recv_counts` the counts come with
        the messages; ranks may differ in whether they give them. Rows must have equal shape and dtype on all ranks.
        """
        source = readable(x, "x", "all_to_all_v")
        if x.ndim == 0:
            raise XcclUsageError("all_to_all_v: x must have at least one axis, got a 0-dimensional array")
        send = _counts(send_counts, self.size, "send_counts")
        if sum(send) != x.shape[0]:
            raise XcclUsageError(f"all_to_all_v: send_counts sum up to {sum(send)} rows, but x has {x.shape[0]}")
        row_bytes = x.itemsize * int(np.prod(x.shape[1:], dtype=np.int64))
        if recv_counts is None and row_bytes == 0:  # rows without bytes cannot be counted by their bytes
            recv_counts = self.all_to_all(np.array(send, dtype=np.int64), timeout=timeout)
        send_bytes = ffi.new("uint64_t[]", [count * row_bytes for count in send])
        call = (self._handle(), source, send_bytes, row_bytes, _dtype_code(x.dtype))
        nanoseconds = timeout_ns(timeout)
        if recv_counts is None:
            recv_bytes = ffi.new("uint64_t[]", self.size)
            check(lib.xccl_coll_all_to_all_v_begin(*call, nanoseconds, recv_bytes))
            rows = sum(recv_bytes) // row_bytes
            shape = (rows, *x.shape[1:])
            try:
                out, target = _result(out, shape, x.dtype, "all_to_all_v")
            except XcclUsageError:
                # the rows are on their way: taking them keeps this rank in step with those that did nothing wrong
                scratch = np.empty(shape, x.dtype)
                check(lib.xccl_coll_all_to_all_v_finish(self._handle(), nanoseconds, _pointer(array_address(scratch))))
                raise
            check(lib.xccl_coll_all_to_all_v_finish(self._handle(), nanoseconds, _pointer(target)))
        else:
            receive = _counts(recv_counts, self.size, "recv_counts")
            recv_bytes = ffi.new("uint64_t[]", [count * row_bytes for count in receive])
            out, target = _result(out, (sum(receive), *x.shape[1:]), x.dtype, "all_to_all_v")
            check(lib.xccl_coll_all_to_all_v(*call, recv_bytes, nanoseconds, _pointer(target)))
        return out

    def _rows_per_rank(self, x: Array, operation: str) -> int:
        if x.ndim == 0 or x.shape[0] % self.size != 0:
            raise XcclUsageError(
                f"{operation}: axis 0 of x must be divisible by the number of ranks, {self.size}; got shape {x.shape}"
            )
        return int(x.shape[0]) // self.size


def _dtype_code(dtype: np.dtype[Any]) -> int:
    return _DTYPES.get(dtype, int(lib.XCCL_BYTES))


def _reduction(dtype: np.dtype[Any], op: str, operation: str) -> tuple[int, int]:
    """Codes of a dtype and a reduction that fit together."""
    if op not in _REDUCE_OPS:
        raise XcclUsageError(f"{operation}: op is one of {', '.join(_REDUCE_OPS)}, got {op!r}")
    code = _dtype_code(dtype)
    if code in _NOT_REDUCED or (code == lib.XCCL_BOOL and op in ("sum", "prod")):
        raise XcclUsageError(f"{operation}: op {op!r} is not defined for dtype {dtype}")
    return code, _REDUCE_OPS[op]


def _checked_out(out: Array, shape: tuple[int, ...], dtype: np.dtype[Any], operation: str) -> int:
    """Address of an output array of just this shape and dtype."""
    address = address_to_write(out, "out", operation)
    if out.shape != shape or out.dtype != dtype:
        raise XcclUsageError(f"{operation}: out must be {dtype}{list(shape)}, got {out.dtype}{list(out.shape)}")
    return address


def _result(out: Array | None, shape: tuple[int, ...], dtype: np.dtype[Any], operation: str) -> tuple[Array, int]:
    """`out` after checking it, or a new array; and its address."""
    if out is None:
        out = np.empty(shape, dtype)
    return out, _checked_out(out, shape, dtype, operation)


def _pointer(address: int) -> Any:
    return ffi.cast("char *", address)


def _counts(counts: Counts, size: int, name: str) -> list[int]:
    """Row counts, one for each rank."""
    array = np.asarray(counts)
    if array.shape != (size,) or (size > 0 and array.dtype.kind not in "iu"):
        raise XcclUsageError(
            f"all_to_all_v: {name} must be {size} integers, one per rank; got {array.dtype}{list(array.shape)}"
        )
    rows: list[int] = array.tolist()
    if min(rows) < 0:
        raise XcclUsageError(f"all_to_all_v: {name}[{rows.index(min(rows))}] is {min(rows)}; counts are >= 0")
    return rows
