"""The hand-written calls (csrc/python/entry.c): what they take, what they decline, and that they keep no references."""

from __future__ import annotations

import gc
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import ranks

import xccl
from xccl._binding import entry

_DTYPES = (
    *("float32", "float16", "float64", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"),
    *("uint64", "complex64", "complex128", "longlong", "ulonglong", ml_dtypes.bfloat16),
)


def _read_only(a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    a.flags.writeable = False
    return a


@ranks(1, 2)
def test_ordinary_calls_are_taken(comm: xccl.Communicator) -> None:
    c, size, peer = comm._entry, comm.size, comm.size - 1 - comm.rank
    for dtype in _DTYPES:
        x = np.arange(2 * size).reshape(size, 2).astype(dtype)
        for out in (None, np.empty_like(x)):
            assert entry.all_to_all(c, x, out, None).dtype == x.dtype
            assert entry.broadcast(c, x, 0, out, 20.0) is (x if out is None else out)
        assert entry.all_gather(c, x, np.empty((size, size, 2), dtype), None) is not None
        if x.dtype.kind != "c":
            assert entry.all_reduce(c, x, "max", x.copy(), None) is not None
            assert entry.reduce_scatter(c, x, "max", None, None).shape == (1, 2)
        symmetric = comm.zeros(x.shape, dtype)
        assert entry.put(c, symmetric, x, peer)
        assert entry.get(c, x, symmetric, peer)
        assert entry.send(c, x, peer, 3, "default", None)
        assert entry.recv(c, x, peer, xccl.ANY_TAG, None) == (peer, 3, x.nbytes)
    signal = comm.signal()
    assert entry.put_signal(c, symmetric, x, peer, signal.words, 1, "add")
    assert entry.wait_until(c, signal.words, ">=", 1, None) in (1, 5)  # the peer may be further already
    assert entry.signal_op(c, signal.words, 5, peer, "set")
    assert entry.wait_until(c, signal.words, "==", 5, 20.0) == 5
    assert entry.barrier(c, None)


def test_anything_else_is_declined() -> None:
    """None, before anything is sent: the Python checks then explain, or make the call."""
    comm = xccl.init()
    c, x = comm._entry, np.zeros((4, 3))
    wrong: list[Any] = [
        [1, 2],
        x[:, ::2],
        np.asfortranarray(x),
        x.astype(">f8"),
        x.astype(object),
        np.zeros(4, "f4,i4"),
        np.zeros(4, "M8[s]"),
    ]
    for a in wrong:
        assert entry.all_to_all(c, a, None, None) is None
        assert entry.send(c, a, 0, 0, "default", None) is None
    for out in (*wrong, x[:3], x.astype("f4"), x.reshape(2, 6), _read_only(x.copy())):
        assert entry.all_to_all(c, x, out, None) is None
        assert entry.all_reduce(c, x, "sum", out, None) is None
        assert entry.all_gather(c, x[0], out, None) is None
        assert entry.put(c, out, x, 0) is None
    for timeout in (-1.0, float("nan"), "1", 1):
        assert entry.barrier(c, timeout) is None
    assert entry.recv(c, _read_only(x.copy()), 0, 0, None) is None
    assert entry.send(c, x, np.int64(0), 0, "default", None) is None
    assert entry.send(c, x, 0, 0, "fast", None) is None
    assert entry.all_reduce(c, x, "mean", None, None) is None
    assert entry.all_reduce(c, x.astype(bool), "sum", None, None) is None
    assert entry.all_reduce(c, x.astype(complex), "sum", None, None) is None
    assert entry.broadcast(c, x, 1, None, None) is None
    assert entry.reduce_scatter(c, np.array(1.0), "sum", None, None) is None
    assert entry.put_signal(c, x, x, 0, comm.signal(2).words, 1, "set") is None
    assert entry.barrier(None, None) is None
    comm.close()
    assert entry.barrier(c, None) is None
    assert entry.all_to_all(c, x, None, None) is None


@ranks(2)
def test_axis_zero_must_be_divisible(comm: xccl.Communicator) -> None:
    assert entry.all_to_all(comm._entry, np.zeros(3), None, None) is None
    assert entry.reduce_scatter(comm._entry, np.zeros((3, 2)), "sum", None, None) is None


def test_unusual_calls_give_the_same_as_ordinary_ones() -> None:
    comm = xccl.init()
    for x in (np.arange(6, dtype=">i4"), np.zeros(3, "f4,i4"), np.arange(6).astype("M8[s]")):
        assert comm.all_to_all(x).tobytes() == x.tobytes()
        assert comm.all_gather(x).dtype == x.dtype
    x = np.arange(4.0)
    comm.send(x, np.int32(0), np.uint8(3), timeout=5)
    assert comm.recv(np.empty(4), np.int64(0), np.int8(3), timeout=5) == (0, 3, 32)
    signal = comm.signal()
    comm.signal_op(signal, np.uint64(2**64 - 1), 0)
    assert comm.wait_until(signal, "==", 2**64 - 1, timeout=5) == 2**64 - 1
    with pytest.raises(xccl.XcclUsageError, match=r"value is from 0 to 2\*\*64 - 1, got -1"):
        comm.signal_op(signal, -1, 0)
    with pytest.raises(xccl.XcclUsageError, match="pe must be an integer, got float"):
        comm.put(comm.zeros(4), x, 0.5)  # type: ignore[arg-type]
    comm.close()


def test_no_references_are_kept() -> None:
    comm = xccl.init()
    x, out = np.zeros((4, 3)), np.zeros((4, 3))
    symmetric, signal = comm.zeros((4, 3)), comm.signal()
    prepared = comm.prepare("all_to_all", x, out=out)
    small = np.zeros(1)

    def calls() -> None:
        comm.all_to_all(x, out=out)
        comm.all_to_all(x)
        comm.all_reduce(x, "max", out=out)
        comm.broadcast(x, 0, out=out)
        comm.put_signal(symmetric, x, 0, signal=signal, value=1)
        comm.send(x, 0)
        comm.recv(out, 0)
        prepared()
        with pytest.raises(xccl.XcclUsageError):
            comm.all_to_all(x, out=small)
        with pytest.raises(xccl.XcclUsageError):
            comm.put(x, out, 0)  # not symmetric: found by the C core

    watched = [None, x, out, small, symmetric, signal.words, prepared, comm, x.dtype, small.dtype]
    calls()
    before = [sys.getrefcount(o) for o in watched]
    for _ in range(200):
        calls()
    after = [sys.getrefcount(o) for o in watched]
    assert [abs(b - a) < 100 for a, b in zip(before, after, strict=True)] == [True] * len(watched), (before, after)
    comm.close()


def test_a_prepared_operation_lets_go_of_its_arrays() -> None:
    comm = xccl.init()
    x = np.zeros(4)
    before = sys.getrefcount(x)
    operation: Any = comm.prepare("all_to_all", x)
    assert sys.getrefcount(x) > before
    with pytest.raises(TypeError, match="takes no arguments"):
        operation(1)
    assert repr(operation) == "<xccl.Prepared all_to_all of rank 0>"
    del operation
    gc.collect()
    assert sys.getrefcount(x) == before
    comm.close()
