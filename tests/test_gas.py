"""put, get, signals and atomics: what they refuse."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from support import ranks

import xccl
from xccl._binding import check, ffi, lib


def _alone() -> xccl.Communicator:
    return xccl.init()


@ranks(1, 2, 5)
def test_get_reads_what_the_peer_holds(comm: xccl.Communicator) -> None:
    for dtype in ("int8", "float64", ml_dtypes.bfloat16, "complex64", "bool"):
        mine = comm.array(np.arange(6).reshape(2, 3).astype(dtype) + np.array(comm.rank).astype(dtype))
        for pe in range(comm.size):
            got = np.empty_like(mine)
            comm.get(got, mine, pe)
            assert got.tobytes() == comm.ptr(mine, pe).tobytes()
            assert (got == (np.arange(6).reshape(2, 3).astype(dtype) + np.array(pe).astype(dtype))).all()


@ranks(2)
def test_operations_touch_only_what_they_name(comm: xccl.Communicator) -> None:
    a = comm.full(8, -1, "int64")
    if comm.rank == 0:
        comm.put(a[2:5], np.array([2, 3, 4]), 1)
    comm._sync(None)
    assert a.tolist() == ([-1] * 8 if comm.rank == 0 else [-1, -1, 2, 3, 4, -1, -1, -1])


def test_arguments_are_checked() -> None:
    with _alone() as comm:
        a, signal = comm.zeros(4, "float32"), comm.signal(2)
        ordinary = np.zeros(4, "float32")
        cases = [
            (lambda: comm.put(ordinary, a, 0), "not inside one live symmetric array"),
            (lambda: comm.put(a, ordinary.astype("float64"), 0), r"dst is float32\[4\], src is float64\[4\]"),
            (lambda: comm.put(a, np.zeros(5, "float32"), 0), r"float32\[5\]"),
            (lambda: comm.put(a, ordinary, 1), "rank 1 is not in this communicator of 1 ranks"),
            (lambda: comm.put(a, ordinary, -1), "rank -1 is not in this communicator"),
            (lambda: comm.put(a[::2], ordinary[::2].copy(), 0), "dst must be C-contiguous"),
            (lambda: comm.get([1, 2], a, 0), "dst must be a NumPy array, got list"),
            (lambda: comm.put_signal(a, ordinary, 0, signal=signal, value=1), r"has 2 words, name one of them"),
            (lambda: comm.put_signal(a, ordinary, 0, signal=signal[0], value=1, op="or"), "op is one of set, add"),
            (lambda: comm.wait_until(signal[0], "=>", 1), "cmp is one of"),
            (lambda: comm.wait_until(signal[0], ">=", 1, timeout=-1), "timeout= is a number of seconds"),
            (lambda: comm.atomic_fetch_add(a, 1, 0), "target must be one element"),
            (lambda: comm.zeros(-1), "negative extent"),
            (lambda: comm.zeros(3, object), "Python objects"),
            (lambda: comm.signal(0), "n must be at least 1"),
        ]
        for call, message in cases:
            with pytest.raises(xccl.XcclUsageError, match=message):
                call()
        read_only = np.zeros(4, "float32")
        read_only.flags.writeable = False
        comm.put(a, read_only, 0)
        with pytest.raises(xccl.XcclUsageError, match="dst is read-only"):
            comm.get(read_only, a, 0)


def test_freed_memory_is_refused() -> None:
    with _alone() as comm:
        a = comm.zeros(4)
        comm.free(a)
        with pytest.raises(xccl.XcclUsageError, match=r"after comm\.free"):
            comm.put(a, np.zeros(4), 0)
        with pytest.raises(xccl.XcclUsageError, match="live symmetric"):
            comm.free(a)
        with pytest.raises(xccl.XcclUsageError, match="did not allocate"):
            comm.free(comm.zeros((4, 4096))[2])


def test_closed_communicator_is_refused() -> None:
    comm = _alone()
    a = comm.zeros(4)
    comm.close()
    comm.close()
    with pytest.raises(xccl.XcclUsageError, match="is closed"):
        comm.put(a, np.zeros(4), 0)


@ranks(4)
def test_memory_of_another_communicator_is_refused(comm: xccl.Communicator) -> None:
    half = comm.split(comm.rank // 2)
    assert half is not None
    a = half.zeros(4)
    outside = (comm.rank + 2) % 4
    if comm.rank == 0:
        comm.put(a, np.ones(4), 1)
    comm._sync(None)
    if comm.rank == 2:
        # rank 3 allocated too (on the other half, at the same place): only ranks without a copy are refused
        b = half.split(0 if half.rank == 0 else None)
        assert b is not None
        c = b.zeros(4)
        with pytest.raises(xccl.XcclUsageError, match="has no copy of this array"):
            comm.put(c, np.ones(4), outside)
    elif comm.rank == 3:
        assert half.split(None) is None
    comm._sync(None)


@ranks(1, 2)
def test_wait_until_compares_and_returns_what_it_saw(comm: xccl.Communicator) -> None:
    signal = comm.signal()
    comm.signal_op(signal, 5, comm.rank)
    assert signal.value == 5
    for cmp, value in (("==", 5), ("!=", 4), (">", 4), (">=", 5), ("<", 6), ("<=", 5)):
        assert comm.wait_until(signal, cmp, value) == 5  # type: ignore[arg-type]
    for cmp, value in (("==", 4), ("!=", 5), (">", 5), (">=", 6), ("<", 5), ("<=", 4)):
        with pytest.raises(xccl.XcclTimeout, match="seen 5"):
            comm.wait_until(signal, cmp, value, timeout=0.01)  # type: ignore[arg-type]
    comm._sync(None)  # a wait that only a rank that has left could end is XcclPeerLost instead


@ranks(2, 4)
def test_two_groups_do_not_share_signals(comm: xccl.Communicator) -> None:
    """Bug class 2: a signal in one group must not complete a wait in another."""
    evens_or_odds, halves = comm.split(comm.rank % 2), comm.split(comm.rank * 2 // comm.size)
    assert evens_or_odds is not None
    assert halves is not None
    first, second = evens_or_odds.signal(), halves.signal()
    for pe in range(evens_or_odds.size):
        evens_or_odds.signal_op(first, 1, pe, op="add")
    assert evens_or_odds.wait_until(first, ">=", evens_or_odds.size) == evens_or_odds.size
    with pytest.raises(xccl.XcclTimeout):
        halves.wait_until(second, "!=", 0, timeout=0.05)
    comm._sync(None)


@ranks(2, 3, 5)
def test_bounce_ends_on_both_ranks_each_time(comm: xccl.Communicator) -> None:
    signal, elapsed = comm.signal(), ffi.new("uint64_t *")
    peer = comm.rank ^ 1
    for rounds in (1, 7, 100):
        if peer < comm.size:
            check(lib.xccl_gas_bounce(comm._handle(), signal.pointer, peer, rounds, int(20e9), elapsed))
            assert elapsed[0] > 0
    comm.barrier()
    assert signal.value == (108 if peer < comm.size else 0)


def test_bounce_needs_a_peer() -> None:
    with _alone() as comm, pytest.raises(xccl.XcclUsageError, match="another rank"):
        check(lib.xccl_gas_bounce(comm._handle(), comm.signal().pointer, 0, 1, 0, ffi.new("uint64_t *")))
