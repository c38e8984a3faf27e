"""Litmus tests: one for each promise of docs/memory-model.md, by its number."""

from __future__ import annotations

import gc

import numpy as np
from support import ranks

import xccl

TURNS = 300


def _neighbours(comm: xccl.Communicator) -> tuple[int, int]:
    return (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size


@ranks(2, 3, 8)
def test_1_put_is_complete_after_quiet_and_a_later_signal(comm: xccl.Communicator) -> None:
    a, told = comm.zeros(TURNS, "int64"), comm.signal()
    to, _ = _neighbours(comm)
    for turn in range(TURNS):
        comm.put(a[turn : turn + 1], np.array([turn + 1]), to)
    comm.quiet()
    comm.signal_op(told, 1, to)
    comm.wait_until(told, "==", 1)
    assert a.tolist() == list(range(1, TURNS + 1))


@ranks(2, 3, 8)
def test_2_put_signal_makes_its_data_visible_before_its_signal(comm: xccl.Communicator) -> None:
    """Message passing: whoever sees the flag sees the data, in every turn, for data of many cache lines."""
    a, flag, done = comm.zeros((2, 1000), "int64"), comm.signal(), comm.signal()
    to, source = _neighbours(comm)
    for turn in range(1, TURNS):
        comm.put_signal(a[turn % 2], np.full(1000, turn + comm.rank), to, signal=flag, value=turn)
        assert comm.wait_until(flag, ">=", turn) >= turn
        assert (a[turn % 2] == turn + source).all()
        comm.signal_op(done, turn, source)
        comm.wait_until(done, ">=", turn - 1 if turn > 1 else 0)


@ranks(2, 4)
def test_3_fence_orders_puts_to_one_pe(comm: xccl.Communicator) -> None:
    """A flag that is put as data, after a fence, comes after the data that was put before the fence."""
    a, flag = comm.zeros(TURNS, "int64"), comm.zeros(1, "int64")
    to, _ = _neighbours(comm)
    seen = -1
    for turn in range(TURNS):
        comm.put(a[turn : turn + 1], np.array([turn + 7]), to)
        comm.fence()
        comm.put(flag, np.array([turn + 1]), to)
        now = comm.atomic_fetch(flag, comm.rank)
        assert now >= seen
        assert (a[:now] == np.arange(now) + 7).all()
        seen = now
    comm._sync(None)
    assert comm.atomic_fetch(flag, comm.rank) == TURNS


@ranks(3, 8)
def test_4_visibility_is_transitive_over_signals(comm: xccl.Communicator) -> None:
    """0 writes to the last rank, signals 1, 1 signals 2, ...: the last rank sees the write of 0."""
    a, flag = comm.zeros(1, "int64"), comm.signal()
    last = comm.size - 1
    for turn in range(1, TURNS // 6):
        if comm.rank == 0:
            comm.put(a, np.array([turn]), last)
            comm.quiet()
            comm.signal_op(flag, turn, 1)
            comm.wait_until(flag, ">=", turn)
        else:
            comm.wait_until(flag, ">=", turn)
            if comm.rank == last:
                assert a[0] == turn
            comm.signal_op(flag, turn, (comm.rank + 1) % comm.size)


@ranks(2, 3, 8)
def test_5_atomics_lose_no_update(comm: xccl.Communicator) -> None:
    counters = {kind: comm.zeros(1, kind) for kind in ("int64", "uint64", "int32", "uint32")}
    for _ in range(TURNS):
        for counter in counters.values():
            comm.atomic_fetch_add(counter, 3, 0)
    comm._sync(None)
    for counter in counters.values():
        assert comm.atomic_fetch(counter, 0) == 3 * TURNS * comm.size


@ranks(2, 4)
def test_5_compare_swap_is_a_lock(comm: xccl.Communicator) -> None:
    lock, value = comm.zeros(1, "int64"), comm.zeros(1, "int64")
    turns = TURNS // 6
    for _ in range(turns):
        while comm.atomic_compare_swap(lock, 0, comm.rank + 1, 0) != 0:
            pass
        theirs = comm.ptr(value, 0)
        theirs[0] = theirs[0] + 1
        assert comm.atomic_swap(lock, 0, 0) == comm.rank + 1
    comm._sync(None)
    assert comm.ptr(value, 0)[0] == turns * comm.size


@ranks(2, 4)
def test_6_signals_that_add_count_every_sender(comm: xccl.Communicator) -> None:
    arrived = comm.signal()
    for turn in range(1, TURNS // 10):
        for pe in range(comm.size):
            comm.signal_op(arrived, 1, pe, op="add")
        assert comm.wait_until(arrived, ">=", turn * comm.size) >= turn * comm.size
        comm._sync(None)


@ranks(2)
def test_7_arrays_outlive_the_communicator(comm: xccl.Communicator) -> None:
    a = comm.full(1000, comm.rank + 5, "int32")
    theirs = comm.ptr(a, 1 - comm.rank)[10:20]
    comm._sync(None)
    comm.close()
    del comm
    gc.collect()
    assert (a == a[0]).all()
    assert theirs.tolist() == [6 - (a[0] - 5)] * 10


@ranks(1, 2, 5)
def test_8_fresh_memory_is_zero_and_early_puts_are_kept(comm: xccl.Communicator) -> None:
    """Bug class 1: a rank that zeroes its copy after the collective allocation wipes what a faster peer wrote."""
    to, source = _neighbours(comm)
    for turn in range(TURNS // 3):
        a, flag = comm.zeros(3, "int64"), comm.signal()
        comm.put(a[1:2], np.array([turn + comm.rank + 1]), to)
        comm.signal_op(flag, 1, to)
        comm.wait_until(flag, "==", 1)
        assert a.tolist() == [0, turn + source + 1, 0]
        comm.free(a)
        comm.free(flag)


@ranks(2)
def test_5_atomics_have_one_order(comm: xccl.Communicator) -> None:
    """Store buffering: each rank writes its word and reads the other's. One write is first, so not both read 0."""
    words, reads = comm.zeros((2, TURNS), "int64"), comm.zeros((2, TURNS), "int64")
    comm._sync(None)
    for turn in range(TURNS):
        own, other = (words[r, turn : turn + 1] for r in (comm.rank, 1 - comm.rank))
        comm.atomic_swap(own, 1, 0)
        reads[comm.rank, turn] = comm.atomic_fetch(other, 0)
    comm.put(reads[comm.rank], reads[comm.rank], 0)
    comm._sync(None)
    if comm.rank == 0:
        assert (reads.max(axis=0) == 1).all()
