"""RowPool: live arrays never overlap, and memory comes back when they are gone."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from support import ranks

import xccl
from xccl._binding import array_address

F32 = np.dtype(np.float32)


def small_group(comm: xccl.Communicator) -> xccl.ExpertParallel:
    """Its pool has room for 2 * 16 * 1 rows of 4 KiB on one rank."""
    return xccl.ExpertParallel(comm, 1, 1024, 1, 16, F32)


def in_pool(ep: xccl.ExpertParallel, a: np.ndarray) -> bool:
    base = array_address(ep.comm._world.array(ep._pool._offset, (1,), F32))
    return base <= array_address(a) < base + ep._pool._nbytes


@ranks(1)
@pytest.mark.parametrize("seed", range(5))
def test_live_arrays_never_overlap(comm: xccl.Communicator, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with small_group(comm) as ep:
        live: dict[int, np.ndarray] = {}
        for turn in range(400):
            if live and rng.random() < 0.5:
                gone = rng.choice(list(live))
                del live[gone]
            else:
                live[turn] = ep.empty(int(rng.integers(0, 9)))
                live[turn][...] = turn
            for mark, a in live.items():
                assert (a == mark).all()
        live.clear()
        del a
        assert ep._pool.live == 0


@ranks(1)
def test_the_lowest_free_place_is_reused(comm: xccl.Communicator) -> None:
    with small_group(comm) as ep:
        first = ep.empty(4)
        at = array_address(first)
        second = ep.empty(4)
        del first
        assert array_address(ep.empty(4)) == at
        assert array_address(ep.empty(5)) > array_address(second)


@ranks(1)
def test_a_view_keeps_its_memory(comm: xccl.Communicator) -> None:
    with small_group(comm) as ep:
        view = ep.empty(4)[1:3, 5:7]
        view[...] = 5
        for _ in range(10):
            ep.empty(8)[...] = 7
        assert (view == 5).all()
        view = view.astype(np.float64)
        gc.collect()
        assert ep._pool.live == 0


@ranks(1)
def test_an_exhausted_pool_gives_ordinary_arrays(comm: xccl.Communicator) -> None:
    with small_group(comm) as ep:
        arrays = [ep.empty(8) for _ in range(6)]
        assert [in_pool(ep, a) for a in arrays] == [True] * 4 + [False] * 2
        arrays[5][...] = 1
        x, idx = np.ones((16, 1024), F32), np.zeros((16, 1), np.int64)
        recv_x, handle = ep.dispatch(x, idx)
        assert not in_pool(ep, recv_x)
        np.testing.assert_array_equal(ep.combine(recv_x, handle), x)


@ranks(1, 2)
def test_steady_use_stays_on_the_same_pages(comm: xccl.Communicator) -> None:
    with small_group(comm) as ep:
        x, idx = np.ones((16, 1024), F32), np.zeros((16, 1), np.int64)
        places = set()
        for _ in range(10):
            recv_x, handle = ep.dispatch(x, idx)
            ep.combine(recv_x, handle)
            places.add(array_address(recv_x) if len(recv_x) else 0)
            del recv_x
        assert len(places) == 1
