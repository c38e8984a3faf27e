"""Survivors of a loss: one agreed communicator, on which everything works."""

from __future__ import annotations

import os
import random
import signal
import time

import numpy as np
import pytest
from support import ranks

import xccl


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def lose(comm: xccl.Communicator, victim: int, group: xccl.Communicator | None = None) -> None:
    """Rank `victim` dies, when nobody is in the middle of what went before; the others return once they noticed."""
    ready = comm.signal()
    if comm.rank == victim:
        comm.wait_until(ready, "==", comm.size - 1)
        die()
    comm.signal_op(ready, 1, victim, op="add")
    comm = group or comm
    try:
        while True:
            comm.barrier(timeout=20)
    except xccl.XcclPeerLost:
        pass


def check_everything(comm: xccl.Communicator) -> None:
    """All layers work, and the members agree."""
    everyone = comm.all_gather(np.array([comm.rank, comm.size]))
    assert everyone.tolist() == [[rank, comm.size] for rank in range(comm.size)]
    assert comm.all_reduce(np.ones(70000), "sum")[-1] == comm.size
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    request = comm.isend(np.full(300_000, comm.rank, np.uint8), right, 4)
    got = np.empty(300_000, np.uint8)
    comm.recv(got, left, 4)
    request.wait()
    assert (got == left).all()
    a, arrived = comm.zeros(3), comm.signal()
    comm.put_signal(a, np.full(3, comm.rank + 1.0), right, signal=arrived, value=1)
    comm.wait_until(arrived, "==", 1)
    assert a[0] == left + 1
    ep = xccl.ExpertParallel(comm, 5, 16, 2, 8, dtype="float32")
    x = np.full((4, 16), float(comm.rank + 1), np.float32)
    idx = np.array([[0, 4], [1, -1], [2, 3], [-1, -1]])
    recv_x, handle = ep.dispatch(x, idx)
    out = ep.combine(recv_x, handle)
    assert out[:, 0].tolist() == [2.0 * x[0, 0], x[0, 0], 2.0 * x[0, 0], 0.0]
    ep.close()


@ranks(2, 3, 4, 9, keep_going=True)
def test_survivors_go_on(comm: xccl.Communicator) -> None:
    kept = comm.full(4, comm.rank)
    lose(comm, comm.size // 2)
    survivors = comm.shrink(timeout=20)
    assert survivors.size == comm.size - 1
    assert survivors.rank == comm.rank - (comm.rank > comm.size // 2)
    check_everything(survivors)
    assert (kept == comm.rank).all()  # what was allocated before is still there
    with pytest.raises(xccl.XcclUsageError, match="closed"):
        comm.barrier()
    survivors.close()


@ranks(5, keep_going=True)
def test_losses_one_after_the_other(comm: xccl.Communicator) -> None:
    """Each communicator of survivors can lose more, the first rank too."""
    while comm.size > 1:
        lose(comm, 0)
        comm = comm.shrink(timeout=20)
        check_everything(comm)
    comm.close()


@ranks(6, keep_going=True)
def test_a_group_shrinks_and_the_others_do_too(comm: xccl.Communicator) -> None:
    group = comm.split(comm.rank % 2)
    assert group is not None
    lose(comm, 2, group)
    group = group.shrink(timeout=20)
    assert group.size == (2 if comm.rank % 2 == 0 else 3)
    check_everything(group)
    survivors = comm.shrink(timeout=20)
    assert survivors.size == 5
    check_everything(survivors)


@pytest.mark.parametrize("seed", range(4))
@ranks(7, keep_going=True)
def test_deaths_while_shrinking_leave_one_view(comm: xccl.Communicator, seed: int) -> None:
    """Two ranks die at random moments of the shrink of the others; those that live have one view."""
    rng = random.Random(seed * 100 + comm.rank)
    lose(comm, 3)
    if comm.rank in (0, 5):
        signal.signal(signal.SIGALRM, lambda *_: die())
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 0.15))
    views = []
    while True:
        comm = comm.shrink(timeout=30)
        views.append((comm.rank, comm.size))
        try:
            for _ in range(200):
                members = comm.all_gather(np.array(views[-1]))
                assert members.tolist() == [[rank, comm.size] for rank in range(comm.size)]
                time.sleep(1e-3)
        except xccl.XcclPeerLost:
            continue
        if comm.size == 4:
            break
    check_everything(comm)


@ranks(3, keep_going=True)
def test_who_does_not_come_is_named(comm: xccl.Communicator) -> None:
    lose(comm, 0)
    if comm.rank == 1:
        with pytest.raises(xccl.XcclTimeout, match="arrival at shrink of rank 2, expected 4, seen 0"):
            comm.shrink(timeout=0.5)
    else:
        time.sleep(1.5)
    survivors = comm.shrink(timeout=20)  # rank 1: again
    assert survivors.size == 2
    check_everything(survivors)


def test_a_loss_without_keep_going_ends_all() -> None:
    def lose_one(comm: xccl.Communicator) -> None:
        if comm.rank == 1:
            die()
        comm.barrier()

    with pytest.raises(xccl.XcclPeerLost, match=r"rank 1 .* was killed by SIGKILL .*the other ranks were ended"):
        xccl.run(lose_one, 3, timeout=30)


def test_keep_going_puts_the_loss_in_the_result() -> None:
    def lose_one(comm: xccl.Communicator) -> int:
        lose(comm, 1)
        return comm.shrink().size

    results = xccl.run(lose_one, 3, timeout=30, keep_going=True)
    assert results[0] == results[2] == 2
    assert isinstance(results[1], xccl.XcclPeerLost)
    assert "rank 1" in str(results[1])
    assert "was killed by SIGKILL" in str(results[1])
