"""init, split, close, fork."""

from __future__ import annotations

import gc
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from support import ranks

import xccl
from xccl._binding import lib


def test_alone_is_a_world_of_one() -> None:
    with xccl.init() as comm:
        assert (comm.rank, comm.size) == (0, 1)
        comm._sync(None)


def test_worlds_of_one_can_be_made_again_and_again() -> None:
    for _ in range(20):
        with xccl.init() as comm:
            comm.zeros(10)


def test_the_mapping_goes_with_the_last_array() -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("/dev/shm/")

    before = mappings()
    comm = xccl.init()
    a = comm.full(3, 7.0)
    comm.close()
    del comm
    gc.collect()
    assert mappings() > before
    assert a.tolist() == [7.0, 7.0, 7.0]
    del a
    gc.collect()
    assert mappings() == before


@ranks(1, 2, 5, 8)
def test_split_orders_by_key_then_rank(comm: xccl.Communicator) -> None:
    group = comm.split(comm.rank % 2, key=-comm.rank)
    assert group is not None
    same = [rank for rank in range(comm.size) if rank % 2 == comm.rank % 2]
    assert group.size == len(same)
    assert group.rank == same[::-1].index(comm.rank)
    tied = comm.split(0, key=0)
    assert tied is not None
    assert tied.rank == comm.rank


@ranks(3)
def test_split_without_color_gives_none(comm: xccl.Communicator) -> None:
    group = comm.split(None if comm.rank == 1 else 7)
    assert (group is None) == (comm.rank == 1)
    if group is not None:
        assert (group.size, group.rank) == (2, comm.rank // 2)
        group._sync(None)
    with pytest.raises(xccl.XcclUsageError, match="color is a number >= 0"):
        comm.split(-1)


@ranks(4)
def test_groups_are_made_and_closed_many_times(comm: xccl.Communicator) -> None:
    """Bug classes 4 and 10: contexts are used again and start from zero; the world stays in step."""
    arrived = comm.zeros((comm.size, 1), "int64")
    stamp = 0
    for turn in range(300):
        group = comm.split((comm.rank + turn) % 2 if turn % 3 else comm.rank // 2)
        assert group is not None
        for _ in range(turn % 4):
            stamp += 1
            for pe in range(comm.size):
                comm.put(arrived[comm.rank], np.array([stamp]), pe)
            group._sync(None)
            # a barrier that a stale counter lets through would show an old stamp of a slower member
            assert (arrived[_members(comm, group)] >= stamp).all()
        group.close()
    comm._sync(None)


def _members(comm: xccl.Communicator, group: xccl.Communicator) -> list[int]:
    return [lib.xccl_comm_world_rank(group._handle(), pe) for pe in range(group.size)]


@ranks(2)
def test_groups_are_limited_by_a_clear_error(comm: xccl.Communicator) -> None:
    groups = [comm.split(0) for _ in range(255)]
    with pytest.raises(xccl.XcclUsageError, match="close communicators that are no longer needed"):
        comm.split(0)
    for group in groups:
        assert group is not None
        group.close()
    assert comm.split(0) is not None


@ranks(2)
def test_a_forked_child_is_not_the_rank(comm: xccl.Communicator) -> None:
    child = os.fork()
    if child == 0:
        try:
            comm._sync(1.0)
        except xccl.XcclUsageError as error:
            os._exit(0 if "was forked from rank" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    comm._sync(None)


@ranks(2)
def test_a_child_cannot_attach_as_its_parents_rank(comm: xccl.Communicator) -> None:
    with pytest.raises(xccl.XcclUsageError, match=f"rank {comm.rank} of this world is taken by pid {os.getpid()}"):
        xccl.init()
    comm._sync(None)


@ranks(3)
def test_a_timeout_names_the_missing_rank_and_breaks_the_communicator(comm: xccl.Communicator) -> None:
    if comm.rank == 2:
        time.sleep(1.0)
        return
    with pytest.raises(
        xccl.XcclTimeout, match=r"(?s)barrier timed out.*missing: barrier signal of rank 2.*rank 2 \(pid"
    ):
        comm._sync(0.3)
    with pytest.raises(xccl.XcclUsageError, match="unusable since a collective operation on it failed"):
        comm._sync(0.3)


def test_a_communicator_cannot_be_pickled() -> None:
    with xccl.init() as comm, pytest.raises(xccl.XcclUsageError, match="cannot be pickled"):
        pickle.dumps(comm)


@ranks(2)
def test_abort_wakes_those_who_wait(comm: xccl.Communicator) -> None:
    if comm.rank == 0:
        time.sleep(0.1)
        comm.abort("enough is enough")
    with pytest.raises(xccl.XcclAborted, match="enough is enough"):
        comm._sync(None)
