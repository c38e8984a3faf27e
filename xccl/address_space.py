"""The global address space: symmetric arrays, put, get, signal, wait, atomics (SHMEM vocabulary: a rank is a `pe`)."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from xccl._base import CommunicatorBase
from xccl._binding import (
    Call,
    address_to_read,
    address_to_write,
    array_address,
    check,
    entry,
    ffi,
    integer,
    lib,
    readable,
    timeout_ns,
    writable,
)
from xccl.errors import XcclUsageError
from xccl.signals import Signal, words_for

Array = np.ndarray[Any, Any]
SignalOp = Literal["set", "add"]
Comparison = Literal["==", "!=", ">", ">=", "<", "<="]

_SIGNAL_OPS = {"set": lib.XCCL_SIGNAL_SET, "add": lib.XCCL_SIGNAL_ADD}
_COMPARISONS = {
    "==": lib.XCCL_CMP_EQ,
    "!=": lib.XCCL_CMP_NE,
    ">": lib.XCCL_CMP_GT,
    ">=": lib.XCCL_CMP_GE,
    "<": lib.XCCL_CMP_LT,
    "<=": lib.XCCL_CMP_LE,
}


class AddressSpace(CommunicatorBase):
    """Symmetric memory and one-sided operations on it.

    A symmetric array has a copy on every rank, at the same offset of the rank's window. Operations name the own
    copy and a `pe`; they act on that rank's copy. Views of symmetric arrays are symmetric too.
    """

    # ---- allocation (collective) ----

    def empty(
        self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float64, *, timeout: float | None = None
    ) -> Array:
        """Allocates a symmetric array; its content is zero, but do not rely on it. Collective.

        Raises XcclUsageError on all ranks if shape or dtype differ between ranks (naming one), and
        XcclOutOfMemory with the bytes needed and free.
        """
        kind = np.dtype(dtype)
        if kind.hasobject:
            raise XcclUsageError(f"empty: dtype {kind} holds Python objects, which cannot be shared")
        extents = (shape,) if isinstance(shape, (int, np.integer)) else tuple(int(extent) for extent in shape)
        if any(extent < 0 for extent in extents):
            raise XcclUsageError(f"empty: negative extent in shape {extents}")
        nbytes = kind.itemsize
        for extent in extents:
            nbytes *= extent
        tag = int.from_bytes(hashlib.blake2b(f"{extents}{kind.str}{kind}".encode(), digest_size=8).digest(), "little")
        offset = ffi.new("uint64_t *")
        check(lib.xccl_heap_alloc(self._handle(), lib.XCCL_AREA_APP, nbytes, 0, tag, timeout_ns(timeout), offset))
        return self._world.array(int(offset[0]), extents, kind)

    def zeros(
        self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float64, *, timeout: float | None = None
    ) -> Array:
        """Allocates a symmetric array of zeros on every rank. Collective; raises as `empty`."""
        # fresh pages are zero before any rank returns from the allocation: zeroing here would wipe early puts
        return self.empty(shape, dtype, timeout=timeout)

    def full(
        self,
        shape: int | tuple[int, ...],
        fill_value: Any,
        dtype: DTypeLike = np.float64,
        *,
        timeout: float | None = None,
    ) -> Array:
        """Allocates a symmetric array filled with `fill_value` on every rank. Collective; raises as `empty`."""
        a = self.empty(shape, dtype, timeout=timeout)
        a[...] = fill_value
        self._sync(timeout)
        return a

    def array(self, obj: ArrayLike, dtype: DTypeLike | None = None, *, timeout: float | None = None) -> Array:
        """Allocates a symmetric array with this rank's `obj` in its own copy. Collective; raises as `empty`.

        Shape and dtype must be equal on all ranks, the contents need not.
        """
        source = np.asarray(obj, dtype=dtype)
        a = self.empty(source.shape, source.dtype, timeout=timeout)
        a[...] = source
        self._sync(timeout)
        return a

    def free(self, a: Array | Signal, *, timeout: float | None = None) -> None:
        """Gives a symmetric array (as it was returned, not a view) or signal back, after all ranks arrived. Collective.

        The array must not be used afterwards, nor its views: the memory may become part of another one.
        """
        address = ffi.cast("void *", array_address(a.words if isinstance(a, Signal) else a))
        offset = ffi.new("uint64_t *")
        check(lib.xccl_gas_offset(self._world._w, address, 1, offset))
        check(lib.xccl_heap_free(self._handle(), lib.XCCL_AREA_APP, offset[0], timeout_ns(timeout)))

    def signal(self, n: int = 1, *, timeout: float | None = None) -> Signal:
        """Allocates `n` symmetric signals, zero at first. Collective."""
        return Signal(self.empty(words_for(n), np.uint64, timeout=timeout))

    def ptr(self, a: Array, pe: int) -> Array:
        """The copy of `a` on rank `pe` as an array: loads and stores go straight to that rank's memory.

        Nothing orders such accesses with the peer's; use signals or a barrier.
        """
        address = readable(a, "a", "ptr")
        out = ffi.new("void **")
        check(lib.xccl_gas_ptr(self._handle(), address, a.nbytes, pe, out))
        return self._world.array_at(int(ffi.cast("uintptr_t", out[0])), a.shape, a.dtype)

    # ---- the race checker ----

    def local_read(self, a: Array) -> None:
        """Says that this rank reads the symmetric array `a` (or what `ptr` gave, or a view) by itself, now.

        For the race checker: loads and stores of NumPy are its blind spot. Does nothing without XCCL_RACECHECK=1;
        with it, raises XcclRaceError if another rank writes the array and nothing orders the two.
        """

    def local_write(self, a: Array) -> None:
        """Says that this rank writes `a` by itself, now; otherwise as `local_read`."""

    # ---- put, get ----

    def put(self, dst: Array, src: Array, pe: int) -> None:
        """Copies `src` into rank `pe`'s copy of the symmetric array `dst`; same shape and dtype.

        Puts may become visible in any order until `fence`, `quiet` or a later put_signal to the same pe.
        """
        if entry.put(self._entry, dst, src, pe) is None:
            self._run(self._put(dst, src, pe))

    def _put(self, dst: Array, src: Array, pe: int) -> Call:
        to, source = _pair(dst, src, "put")
        return entry.PUT, (to, source, src.nbytes, integer(pe, "pe", "put")), None

    def get(self, dst: Array, src: Array, pe: int) -> None:
        """Copies rank `pe`'s copy of the symmetric array `src` into `dst`; same shape and dtype. Complete on return."""
        if entry.get(self._entry, dst, src, pe) is None:
            self._run(self._get(dst, src, pe))

    def _get(self, dst: Array, src: Array, pe: int) -> Call:
        to, source = _pair(dst, src, "get")
        return entry.GET, (to, source, src.nbytes, integer(pe, "pe", "get")), None

    def put_signal(self, dst: Array, src: Array, pe: int, *, signal: Signal, value: int, op: SignalOp = "set") -> None:
        """Puts, then sets (or adds to) rank `pe`'s copy of `signal`: whoever sees the signal sees the data."""
        if entry.put_signal(self._entry, dst, src, pe, signal.words, value, op) is None:
            self._run(self._put_signal(dst, src, pe, signal=signal, value=value, op=op))

    def _put_signal(self, dst: Array, src: Array, pe: int, *, signal: Signal, value: int, op: SignalOp = "set") -> Call:
        to, source = _pair(dst, src, "put_signal")
        word = signal.single("put_signal")
        code = _lookup(_SIGNAL_OPS, op, "put_signal", "op")
        arguments = (to, source, src.nbytes, word, _word(value, "put_signal"), code, integer(pe, "pe", "put_signal"))
        return entry.PUT_SIGNAL, arguments, None

    # ---- signals and order ----

    def signal_op(self, signal: Signal, value: int, pe: int, *, op: SignalOp = "set") -> None:
        """Sets (or adds to) rank `pe`'s copy of `signal`, after all earlier puts of this rank to `pe`."""
        if entry.signal_op(self._entry, signal.words, value, pe, op) is None:
            self._run(self._signal_op(signal, value, pe, op=op))

    def _signal_op(self, signal: Signal, value: int, pe: int, *, op: SignalOp = "set") -> Call:
        word = signal.single("signal_op")
        code = _lookup(_SIGNAL_OPS, op, "signal_op", "op")
        return entry.SIGNAL_OP, (word, _word(value, "signal_op"), code, integer(pe, "pe", "signal_op")), None

    def wait_until(self, signal: Signal, cmp: Comparison, value: int, *, timeout: float | None = None) -> int:
        """Waits until this rank's copy of `signal` compares true with `value`; returns the value seen.

        Everything that the signalling rank ordered before the signal is visible afterwards. Raises XcclTimeout,
        XcclPeerLost, XcclAborted.
        """
        seen: int | None = entry.wait_until(self._entry, signal.words, cmp, value, timeout)
        return self._run(self._wait_until(signal, cmp, value, timeout=timeout)) if seen is None else seen

    def _wait_until(self, signal: Signal, cmp: Comparison, value: int, *, timeout: float | None = None) -> Call:
        word = signal.single("wait_until")
        code = _lookup(_COMPARISONS, cmp, "wait_until", "cmp")
        return entry.WAIT_UNTIL, (word, code, _word(value, "wait_until"), timeout_ns(timeout)), None

    def fence(self) -> None:
        """Orders this rank's earlier puts before its later puts, to each pe."""
        lib.xccl_gas_fence(self._handle())

    def quiet(self) -> None:
        """Completes all earlier puts of this rank: they are visible to every rank that is told so afterwards."""
        lib.xccl_gas_quiet(self._handle())

    # ---- atomics ----

    def atomic_fetch(self, target: Array, pe: int) -> int:
        """Reads rank `pe`'s copy of `target` (one element, 32 or 64 bit integer) atomically."""
        return self._atomic(target, lib.XCCL_ATOMIC_FETCH, 0, 0, pe, "atomic_fetch")

    def atomic_fetch_add(self, target: Array, value: int, pe: int) -> int:
        """Adds to rank `pe`'s copy of `target` (one element, wraps around); returns the value before."""
        return self._atomic(target, lib.XCCL_ATOMIC_FETCH_ADD, value, 0, pe, "atomic_fetch_add")

    def atomic_swap(self, target: Array, value: int, pe: int) -> int:
        """Stores `value` in rank `pe`'s copy of `target` (one element); returns the value before."""
        return self._atomic(target, lib.XCCL_ATOMIC_SWAP, value, 0, pe, "atomic_swap")

    def atomic_compare_swap(self, target: Array, compare: int, value: int, pe: int) -> int:
        """Stores `value` in rank `pe`'s copy of `target` if that equals `compare`; returns the value before."""
        return self._atomic(target, lib.XCCL_ATOMIC_COMPARE_SWAP, value, compare, pe, "atomic_compare_swap")

    def _atomic(self, target: Array, code: int, value: int, compare: int, pe: int, operation: str) -> int:
        word = writable(target, "target", operation)
        if target.size != 1 or target.dtype.kind not in "iu" or target.itemsize not in (4, 8):
            raise XcclUsageError(
                f"{operation}: target must be one element of (u)int32 or (u)int64 (a view such as a[i:i+1]), "
                f"got shape {target.shape}, {target.dtype}"
            )
        mask = (1 << (8 * target.itemsize)) - 1
        old = ffi.new("uint64_t *")
        check(lib.xccl_gas_atomic(self._handle(), word, target.itemsize, code, value & mask, compare & mask, pe, old))
        return int(np.array(old[0], dtype=np.uint64).astype(f"u{target.itemsize}").view(target.dtype))

    def _sync(self, timeout: float | None) -> None:
        """Returns when all ranks have arrived."""
        check(lib.xccl_gas_sync(self._handle(), timeout_ns(timeout)))


def _pair(dst: Array, src: Array, operation: str) -> tuple[int, int]:
    """Addresses of a destination and a source that must agree in shape and dtype."""
    to, source = address_to_write(dst, "dst", operation), address_to_read(src, "src", operation)
    if dst.dtype != src.dtype or dst.shape != src.shape:
        raise XcclUsageError(
            f"{operation}: dst is {dst.dtype}{list(dst.shape)}, src is {src.dtype}{list(src.shape)}: they must be equal"
        )
    return to, source


def _word(value: int, operation: str) -> int:
    """A value for a signal's 64-bit word."""
    number = integer(value, "value", operation, bits=65)
    if not 0 <= number < 1 << 64:
        raise XcclUsageError(f"{operation}: value is from 0 to 2**64 - 1, got {number}")
    return number


def _lookup(table: dict[str, int], word: str, operation: str, name: str) -> int:
    try:
        return table[word]
    except KeyError:
        raise XcclUsageError(f"{operation}: {name} is one of {', '.join(table)}, got {word!r}") from None
