"""Large messages between ordinary arrays, which the kernel copies from process to process; and when it may not."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import pytest
from support import ranks

import xccl
from xccl import ANY_SOURCE, ANY_TAG

RING = 8 * (64 << 10)
SIZES = [16 << 10, (64 << 10) - 1, 64 << 10, 200_001, RING - 1, RING + 1, 5 * RING + 3]
TRIALS = 20  # the first messages of a size take both ways in turn


@pytest.fixture(autouse=True, params=["auto", "off"])
def cma(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XCCL_P2P_SLOTS", "8")
    monkeypatch.setenv("XCCL_CMA", request.param)
    return str(request.param)


def content(nbytes: int, *seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


@ranks(2, 3)
@pytest.mark.parametrize("mode", ["default", "sync"])
def test_sends_of_every_size_arrive(comm: xccl.Communicator, mode: str) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for nbytes in SIZES:
        received = np.zeros(nbytes + 1, np.uint8)
        for turn in range(TRIALS):
            x = content(nbytes, comm.rank, turn)
            received[:] = 0
            if comm.rank == 0:
                comm.send(x, right, turn, mode=mode)
                x[:] = 0  # the caller's again
                comm.recv(received[:-1], left, turn)
            else:
                comm.recv(received[:-1], left, turn)
                comm.send(x, right, turn, mode=mode)
                x[:] = 0
            assert np.array_equal(received[:-1], content(nbytes, left, turn))
            assert received[-1] == 0


@ranks(2, 4)
def test_all_may_send_before_they_receive_what_fits_the_ring(comm: xccl.Communicator) -> None:
    """An offer that nobody takes is withdrawn in time."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for turn in range(TRIALS):
        nbytes = RING // 2 if turn % 2 else 64 << 10
        comm.send(content(nbytes, comm.rank, turn), right, turn, timeout=20)
        received = np.zeros(nbytes, np.uint8)
        assert comm.recv(received, ANY_SOURCE, ANY_TAG) == (left, turn, nbytes)
        assert np.array_equal(received, content(nbytes, left, turn))


@ranks(2)
@pytest.mark.parametrize("others", [0, 3])
def test_messages_that_were_offered_keep_their_order(comm: xccl.Communicator, others: int) -> None:
    """With one tag, small ones among them; the receiver comes late, and asks for another tag first."""
    sizes = [8, 64 << 10, 100_000, 8, 16 << 10, 200_000]
    for turn in range(6):
        if comm.rank == 0:
            pending = [comm.isend(np.full(1000, k, np.uint8), 1, 5) for k in range(others)]
            for k, nbytes in enumerate(sizes):
                comm.send(content(nbytes, turn, k), 1, 3)
            comm.send(np.array([turn]), 1, 4)
            for request in pending:
                request.wait()
        else:
            time.sleep(0.002 * turn)
            last = np.zeros(1, np.int64)
            comm.recv(last, 0, 4)
            for k, nbytes in enumerate(sizes):
                received = np.zeros(nbytes, np.uint8)
                comm.recv(received, ANY_SOURCE, 3)
                assert np.array_equal(received, content(nbytes, turn, k))
            for _ in range(others):
                comm.recv(np.zeros(1000, np.uint8), 0, 5)


@ranks(2)
def test_send_that_times_out_gives_the_buffer_back(comm: xccl.Communicator) -> None:
    nbytes = 5 * RING + 3
    flag = comm.zeros(1, np.int64)
    if comm.rank == 0:
        x = np.full(nbytes, 1, np.uint8)
        with pytest.raises(xccl.XcclTimeout, match="rank 0: send timed out"):
            comm.send(x, 1, 5, timeout=0.05)
        x[:] = 2
        comm.atomic_swap(flag, 1, 1)
        comm.send(x, 1, 5)
    else:
        while comm.atomic_fetch(flag, 1) == 0:
            time.sleep(0.005)
        received = np.zeros(nbytes, np.uint8)
        comm.recv(received, 0, 5)
        assert (received == 2).all()


@ranks(2)
def test_isend_of_what_fits_the_ring_does_not_wait_for_the_receiver(comm: xccl.Communicator) -> None:
    x = content(RING // 2, comm.rank)
    comm.isend(x, 1 - comm.rank).wait(timeout=20)
    received = np.zeros_like(x)
    comm.recv(received, 1 - comm.rank)
    assert np.array_equal(received, content(RING // 2, 1 - comm.rank))


@ranks(2, 3, 5)
def test_collectives_give_the_same_whatever_the_way(comm: xccl.Communicator) -> None:
    for nbytes in (64 << 10, 150_000):
        for turn in range(TRIALS):
            x = content(nbytes * comm.size, comm.rank, turn).reshape(comm.size, nbytes)
            everybodys = [content(x.size, pe, turn).reshape(x.shape) for pe in range(comm.size)]
            expected = np.stack([theirs[comm.rank] for theirs in everybodys])
            result = comm.all_to_all(x)
            x[:] = 0  # the caller's again
            assert np.array_equal(result, expected)
            gathered = comm.all_gather(content(nbytes, comm.rank, turn))
            assert np.array_equal(gathered, np.stack([content(nbytes, pe, turn) for pe in range(comm.size)]))
            got = comm.broadcast(content(nbytes, comm.rank, turn), turn % comm.size)
            assert np.array_equal(got, content(nbytes, turn % comm.size, turn))


@ranks(3)
def test_uneven_messages_of_all_to_all_v(comm: xccl.Communicator) -> None:
    for turn in range(TRIALS):
        counts = np.array([[(a * 7 + b * 3 + turn) % 4 * 60_000 + a for b in range(3)] for a in range(3)])
        x = content(int(counts[comm.rank].sum()), comm.rank, turn)
        result = comm.all_to_all_v(x, counts[comm.rank], counts[:, comm.rank])
        parts = []
        for pe in range(3):
            start = int(counts[pe, : comm.rank].sum())
            parts.append(content(int(counts[pe].sum()), pe, turn)[start : start + counts[pe, comm.rank]])
        assert np.array_equal(result, np.concatenate(parts))


@pytest.mark.parametrize("cma", ["auto"], indirect=True)
def test_death_of_the_sender_of_an_offer_is_told(cma: str) -> None:
    def program(comm: xccl.Communicator) -> str:
        if comm.rank == 1:
            pid = os.getpid()
            if os.fork() == 0:
                time.sleep(0.3)
                os.kill(pid, 9)
                os._exit(0)
            comm.send(np.ones(5 * RING), 0)
        time.sleep(0.6)
        try:
            comm.recv(np.zeros(5 * RING), 1)
        except xccl.XcclPeerLost as error:
            return str(error)
        return "nothing raised"

    assert "rank 1 is lost" in str(xccl.run(program, 2, timeout=30, keep_going=True)[0])
