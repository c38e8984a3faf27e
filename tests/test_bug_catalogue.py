"""Classes of bugs that one-sided communication libraries really had, at the layer below the collectives: barriers,
agreements and allocations. docs/reliability.md says where each class is tested; tests/mutants/ has the bugs themselves.
"""

from __future__ import annotations

import time

import numpy as np
from support import ranks

import xccl


@ranks(3, 5, timeout=40)
def test_3_and_4_a_barrier_waits_for_the_late_rank_every_time(comm: xccl.Communicator) -> None:
    """As many signals as usual, or the counter of an earlier barrier, do not stand for the rank that is missing."""
    arrived = comm.zeros(1, "int64")
    for turn in range(1, 20):
        if comm.rank == turn % comm.size:
            time.sleep(0.01)
        comm.atomic_fetch_add(arrived, 1, 0)
        comm._sync(None)
        assert comm.atomic_fetch(arrived, 0) == turn * comm.size
        comm._sync(None)


@ranks(3, 5, timeout=40)
def test_5_a_signal_that_comes_early_counts(comm: xccl.Communicator) -> None:
    """Others may signal in a new group before this rank has returned from split."""
    for turn in range(10):
        group = comm.split(0, key=(comm.rank + turn) % comm.size)
        assert group is not None
        if comm.rank == turn % comm.size:
            time.sleep(0.005)
        a = group.zeros(1, "int64")
        group.put(a, np.array([turn + 1]), (group.rank + 1) % group.size)
        group._sync(None)
        assert a[0] == turn + 1
        group.close()


@ranks(4, timeout=40)
def test_10_a_groups_barriers_do_not_move_those_of_the_world(comm: xccl.Communicator) -> None:
    """Groups meet a different number of times between two meetings of all."""
    group = comm.split(comm.rank // 2)
    assert group is not None
    arrived = comm.zeros(1, "int64")
    for turn in range(1, 15):
        for _ in range(1 + 2 * (comm.rank // 2)):
            group._sync(None)
        if comm.rank == turn % comm.size:
            time.sleep(0.005)
        comm.atomic_fetch_add(arrived, 1, 0)
        comm._sync(None)
        assert comm.atomic_fetch(arrived, 0) == turn * comm.size
        comm._sync(None)
    group.close()


@ranks(2, 4, timeout=40)
def test_11_memory_is_not_given_back_while_somebody_still_writes_to_it(comm: xccl.Communicator) -> None:
    """A late put must not reach the next array at that place."""
    to = (comm.rank + 1) % comm.size
    for turn in range(6):
        old = comm.zeros(1000, "int64")
        if comm.rank == turn % comm.size:
            time.sleep(0.02)
        comm.put(old, np.full(1000, -1), to)
        comm.free(old)
        new = comm.zeros(1000, "int64")
        assert not new.any()
        comm._sync(None)
        comm.free(new)
