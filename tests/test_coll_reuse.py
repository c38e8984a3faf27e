"""Consecutive collectives reuse slots, blocks and counters: nothing may be overwritten early or taken for something
older. Each test stands for a class of bugs that libraries of this kind had."""

from __future__ import annotations

import time

import numpy as np
import pytest
from coll_cases import same_bits, values
from support import ranks

import xccl


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XCCL_COLL_BLOCK_SIZE", "64K")


class Stragglers:
    """In each turn some ranks come late, the same ones on all ranks' reckoning."""

    def __init__(self, comm: xccl.Communicator, seed: int) -> None:
        self._comm, self._rng = comm, np.random.default_rng(seed)

    def maybe_sleep(self) -> None:
        late = self._rng.random(self._comm.size) < 0.2
        if late[self._comm.rank]:
            time.sleep(0.002)


def message(source: int, turn: int, count: int) -> np.ndarray:
    return np.full(count, source * 100000 + turn, np.int64)


@ranks(2, 3, 6)
def test_an_early_root_does_not_overwrite_what_is_being_read(comm: xccl.Communicator) -> None:
    """Nobody answers a broadcast, so the root could run ahead by any number of them (classes 4, 7)."""
    stragglers = Stragglers(comm, 1)
    for turn in range(150):
        count = (1, 5, 6, 500, 3000, 20000)[turn % 6]
        if comm.rank != 0:
            stragglers.maybe_sleep()
        buf = message(0, turn, count) if comm.rank == 0 else np.zeros(count, np.int64)
        comm.broadcast(buf, 0)
        assert (buf == turn).all(), (turn, count, buf[:3])
        buf[:] = -1


@ranks(3, 8)
def test_roots_take_turns(comm: xccl.Communicator) -> None:
    """A message that comes while a rank looks around is not taken for one of another root."""
    buf = np.zeros(1, np.int64)
    for turn in range(2000):
        buf[0] = turn if comm.rank == turn % comm.size else -1
        assert comm.broadcast(buf, turn % comm.size)[0] == turn


@ranks(2, 3, 6)
def test_a_late_reader_gets_the_old_contents(comm: xccl.Communicator) -> None:
    """The caller changes its array as soon as a call returns, while others may still be in it (class 7)."""
    n = comm.size
    arrays = {kind: (comm.zeros if kind else np.zeros)(n * 20000, np.int64) for kind in (False, True)}
    stragglers = Stragglers(comm, 2)
    for turn in range(60):
        count = (3, 600, 9000, 20000)[turn % 4]
        x = arrays[turn % 3 == 0][: n * count]
        x[:] = comm.rank * 100000 + turn
        stragglers.maybe_sleep()
        result = comm.all_to_all(x) if turn % 2 else comm.all_gather(x[:count])
        x[:] = -1
        expected = np.concatenate([message(rank, turn, count) for rank in range(n)])
        assert (result.reshape(-1) == expected).all(), (turn, count)


@ranks(2, 3, 6)
def test_consecutive_shapes_do_not_mix(comm: xccl.Communicator) -> None:
    """Operation and size change every time, with roots and stragglers (classes 3, 8)."""
    n, stragglers, rng = comm.size, Stragglers(comm, 3), np.random.default_rng(4)
    for turn in range(250):
        count, kind, root = int(rng.choice([0, 1, 5, 6, 511, 513, 9000])), int(rng.integers(5)), int(rng.integers(n))
        stragglers.maybe_sleep()
        own, every = message(comm.rank, turn, count), [message(rank, turn, count) for rank in range(n)]
        if kind == 0:
            assert same_bits(comm.broadcast(own.copy(), root), every[root]), turn
        elif kind == 1:
            assert same_bits(comm.all_gather(own), np.stack(every)), turn
        elif kind == 2:
            assert same_bits(comm.all_reduce(own), np.sum(every, axis=0)), turn
        elif kind == 3:
            assert same_bits(comm.all_to_all(np.tile(own, n)), np.concatenate(every)), turn
        else:
            comm.barrier()


@ranks(2, 5)
def test_every_barrier_blocks(comm: xccl.Communicator) -> None:
    """A counter left over from an earlier barrier must not let a later one pass (class 4)."""
    arrived = comm.zeros(1, np.int64)
    for turn in range(12):
        if comm.rank == turn % comm.size:
            time.sleep(0.01)
            for pe in range(comm.size):
                comm.ptr(arrived, pe)[0] = turn + 1
        comm.barrier()
        assert arrived[0] == turn + 1
        comm.barrier()


@ranks(3, 6)
def test_a_fresh_communicator_keeps_an_early_message(comm: xccl.Communicator) -> None:
    """A member may send before another has returned from split (classes 1, 5)."""
    for turn in range(15):
        group = comm.split(0, key=-comm.rank)
        assert group is not None
        if comm.rank == turn % comm.size:
            time.sleep(0.003)
        assert group.all_gather(np.array([comm.rank]))[:, 0].tolist() == list(range(comm.size))[::-1]
        group.close()


@ranks(4, 6)
def test_communicators_do_not_share_anything(comm: xccl.Communicator) -> None:
    """Groups work at their own pace, then all meet (classes 2, 10)."""
    half = comm.split(comm.rank % 2)
    pair = comm.split(comm.rank // 2, key=-comm.rank)
    assert half is not None
    assert pair is not None
    members = [rank for rank in range(comm.size) if rank % 2 == comm.rank % 2]
    mates = sorted((rank for rank in range(comm.size) if rank // 2 == comm.rank // 2), reverse=True)
    for turn in range(30):
        count = (1, 700, 10000)[turn % 3]
        for extra in range(1 + (comm.rank % 2) * (turn % 3)):  # one half does more than the other
            expected = np.stack([message(rank, turn + extra, count) for rank in members])
            assert same_bits(half.all_gather(message(comm.rank, turn + extra, count)), expected)
        assert pair.all_reduce(message(comm.rank, turn, count))[0] == sum(r * 100000 + turn for r in mates)
        if turn % 5 == 0:
            assert comm.all_reduce(np.array([1])).tolist() == [comm.size]
    half.close()
    pair.close()
    comm.barrier()


@ranks(3)
def test_ranks_may_call_different_communicators_in_different_order_between_meetings(comm: xccl.Communicator) -> None:
    first, second = comm.split(0), comm.split(0)
    assert first is not None
    assert second is not None
    if comm.rank == 0:  # a root does not wait for an answer to short messages
        second.broadcast(np.array([2]), 0)
        first.broadcast(np.array([1]), 0)
    else:
        buf = np.zeros(1, np.int64)
        assert first.broadcast(buf, 0).tolist() == [1]
        assert second.broadcast(buf, 0).tolist() == [2]


@ranks(4)
def test_the_same_bits_on_every_run(comm: xccl.Communicator) -> None:
    stragglers = Stragglers(comm, 5)
    for count in (7, 3000, 40000):
        x = values(comm.rank, 9, (count,), "float32")
        first = comm.all_reduce(x)
        everybodys = comm.all_gather(first)
        assert all(same_bits(row, first) for row in everybodys)
        for _ in range(20):
            stragglers.maybe_sleep()
            assert same_bits(comm.all_reduce(x), first)


@ranks(1, 3)
def test_many_communicators_come_and_go(comm: xccl.Communicator) -> None:
    before = comm._world  # the world's memory is what must not grow
    used = _used(before)
    for _ in range(60):
        group = comm.split(0)
        assert group is not None
        group.all_reduce(np.zeros(20000))
        group.close()
    assert _used(before) == used


def _used(world: object) -> list[int]:
    from xccl._binding import lib

    return [lib.xccl_heap_used(world._w, area) for area in (0, 1, 2)]  # type: ignore[attr-defined]
