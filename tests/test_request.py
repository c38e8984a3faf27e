"""Non-blocking send and receive: progress, lifetime of arrays, back-pressure, close with work pending."""

from __future__ import annotations

import gc
import time
from typing import Any

import numpy as np
import pytest
from support import ranks

import xccl
from xccl import ANY_SOURCE, ANY_TAG

pytestmark = pytest.mark.usefixtures("rings_of_512_kib")

SLOT, RING = 64 << 10, 8 * (64 << 10)
LARGE = 5 * RING + 3


def settle(comm: xccl.Communicator) -> None:
    """Returns when all ranks have called it."""
    comm._sync(None)


@ranks(2, 5)
def test_both_directions_full_at_once_do_not_deadlock(comm: xccl.Communicator) -> None:
    peers = [pe for pe in range(comm.size) if pe != comm.rank]
    sends = [comm.isend(np.full(LARGE, comm.rank, np.uint8), pe, k) for k in range(3) for pe in peers]
    for k in reversed(range(3)):
        for pe in peers:
            received = np.zeros(LARGE, np.uint8)
            comm.recv(received, pe, k)
            assert (received == pe).all()
    for send in sends:
        send.wait()


@ranks(2)
def test_pending_requests_progress_while_the_rank_waits_elsewhere(comm: xccl.Communicator) -> None:
    """A send and a receive larger than the ring end while the rank waits for something else."""
    group = comm.split(0)
    assert group is not None
    done = comm.signal()
    sent, received = np.full(LARGE, 3, np.uint8), np.zeros(LARGE, np.uint8)
    if comm.rank == 0:
        requests = [comm.isend(sent, 1, 1), comm.irecv(received, 1, 2)]
        comm.wait_until(done, "==", 1)
        assert all(request.test() for request in requests)
    else:
        group.isend(sent, 0, 99)  # dropped at once; its array too
        comm.send(sent, 0, 2)
        comm.recv(received, 0, 1)
        comm.signal_op(done, 1, 0)
    assert (received == 3).all()
    if comm.rank == 0:
        group.recv(received, 1, 99)
    group.close()


@ranks(2)
def test_requests_may_be_waited_in_any_order_and_again(comm: xccl.Communicator) -> None:
    other, order = 1 - comm.rank, [4, 0, 3, 1, 2]
    buffers = [np.zeros(n, np.uint8) for n in (3, 50, SLOT, RING, LARGE)]
    receives = [comm.irecv(buffer, other, tag) for tag, buffer in enumerate(buffers)]
    sends = [comm.isend(np.full(buffers[tag].size, tag, np.uint8), other, tag) for tag in order]
    for tag in order:
        assert receives[tag].wait() == receives[tag].wait() == receives[tag].test() == (other, tag, buffers[tag].size)
        assert (buffers[tag] == tag).all()
        assert "complete" in repr(receives[tag])
    for send in sends:
        assert send.wait().source == comm.rank


@ranks(2)
def test_test_makes_progress_and_never_blocks(comm: xccl.Communicator) -> None:
    other = 1 - comm.rank
    received = np.zeros(LARGE, np.uint8)
    receive = comm.irecv(received, other)
    assert receive.test() is None
    settle(comm)
    send = comm.isend(np.full(LARGE, other, np.uint8), other)
    while not (send.test() and receive.test()):
        pass
    assert (received == comm.rank).all()


@ranks(2)
def test_slow_receiver_holds_the_sender_back_and_loses_nothing(comm: xccl.Communicator) -> None:
    """Bug class 9: a full ring neither drops a message nor counts one that was not put."""
    counts = [8] * 300 + [1000] * 40 + [SLOT] * 30 + [LARGE] * 2 + [0] * 100
    if comm.rank == 0:
        for i, n in enumerate(counts):
            comm.send(np.full(n, i % 251, np.uint8), 1, i % 3)
        return
    received: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for i, n in enumerate(counts):
        if i % 50 == 0:
            time.sleep(0.01)
        buffer = np.zeros(n, np.uint8)
        message = comm.recv(buffer, 0, i % 3)
        assert message == (0, i % 3, n)
        assert (buffer == i % 251).all()
        received[i % 3].append(i)


@ranks(2)
def test_sleeping_sender_is_woken_by_room(comm: xccl.Communicator) -> None:
    """The sender sleeps on a full ring; a release must reach it before the 0.1 s at which it looks by itself."""
    chunks = 600
    if comm.rank == 0:
        comm.send(np.zeros(chunks * SLOT, np.uint8), 1)
        settle(comm)
        return
    time.sleep(0.3)
    start = time.monotonic()
    comm.recv(np.zeros(chunks * SLOT, np.uint8), 0)
    settle(comm)
    # 150 lost wake-ups would take 15 s
    assert time.monotonic() - start < 10


@ranks(2)
def test_arrays_of_pending_sends_stay_alive(comm: xccl.Communicator) -> None:
    count = 20
    if comm.rank == 0:
        requests = [comm.isend(np.full(LARGE, i, np.uint8), 1, i) for i in range(count)]
        del requests[::2]  # dropped: must complete all the same
        for i in range(count, 2 * count):
            comm.isend(np.full(LARGE, i, np.uint8), 1, i)
        gc.collect()
        junk = [np.full(LARGE, 255, np.uint8) for _ in range(30)]  # would reuse freed memory
        settle(comm)
        assert len(comm._dropped) == count + count // 2
        for request in requests:
            request.wait()
        settle(comm)
        comm.isend(np.zeros(1), 0)
        assert len(comm._dropped) <= 1, "arrays of completed requests are kept"
        comm.recv(np.zeros(1), 0)
        del junk
    else:
        settle(comm)
        buffer = np.zeros(LARGE, np.uint8)
        for i in reversed(range(2 * count)):
            comm.recv(buffer, 0, i)
            assert (buffer == i).all()
        settle(comm)


@ranks(2)
def test_dropped_receive_still_takes_its_message(comm: xccl.Communicator) -> None:
    if comm.rank == 0:
        settle(comm)
        comm.send(np.full(LARGE, 1, np.uint8), 1, 4)
        comm.send(np.full(8, 2, np.uint8), 1, 4)
    else:
        first = np.zeros(LARGE, np.uint8)
        comm.irecv(first, 0, 4)
        settle(comm)
        second = np.zeros(8, np.uint8)
        comm.recv(second, 0, 4)
        assert (first == 1).all()
        assert (second == 2).all()


@ranks(2)
@pytest.mark.parametrize("symmetric", [False, True])
def test_close_completes_pending_sends(comm: xccl.Communicator, symmetric: bool) -> None:
    group = comm.split(0)
    assert group is not None
    for closing in (group, comm):
        if comm.rank == 0:
            big = comm.zeros(LARGE, np.uint8) if symmetric else np.zeros(LARGE, np.uint8)
            big[:] = 9
            kept = closing.isend(big, 1, 1)
            for tag in (2, 3):
                closing.isend(np.full(LARGE, tag, np.uint8), 1, tag, mode="sync")
            closing.close()
            assert kept.test() == (0, 1, LARGE)
        else:
            if symmetric:
                comm.zeros(LARGE, np.uint8)
            time.sleep(0.05)
            for tag in (3, 2, 1):
                buffer = np.zeros(LARGE, np.uint8)
                closing.recv(buffer, 0, tag)
                assert (buffer == (9 if tag == 1 else tag)).all()
            closing.close()


@ranks(1, 2)
def test_close_refuses_to_lose_a_pending_receive(comm: xccl.Communicator) -> None:
    group = comm.split(0)
    assert group is not None
    for closing in (group, comm):
        buffer = np.zeros(24, np.uint8)
        request = closing.irecv(buffer, 0, 17) if comm.rank == 0 else None
        if request is not None:
            with pytest.raises(
                xccl.XcclUsageError, match=r"1 receives are pending .*: 24 bytes from rank 0 with tag 17"
            ):
                closing.close()
            closing.send(np.full(24, 5, np.uint8), 0, 17)  # still open
            request.wait()
            assert (buffer == 5).all()
            dropped = closing.irecv(buffer, ANY_SOURCE, ANY_TAG)
            del dropped  # nobody can miss it: no reason to refuse
        elif closing is group:
            with pytest.raises(xccl.XcclUsageError, match="rank 0 has messages or receives left over"):
                closing.close()
        closing.close()
        with pytest.raises(xccl.XcclUsageError, match="closed"):
            closing.send(buffer, 0)
        if request is not None:
            assert request.test() == (0, 17, 24)


@ranks(2)
def test_close_refuses_to_lose_messages(comm: xccl.Communicator) -> None:
    group = comm.split(0)
    assert group is not None
    sizes = [8, 1000, SLOT]
    if comm.rank == 0:
        for tag, n in enumerate(sizes):
            group.send(np.zeros(n, np.uint8), 1, tag)
    with pytest.raises(
        xccl.XcclUsageError, match="never received: 8 bytes from rank 0 with tag 0" if comm.rank else "rank 1"
    ):
        group.close()
    if comm.rank == 1:
        for tag, n in reversed(list(enumerate(sizes))):
            group.recv(np.zeros(n, np.uint8), 0, tag)
    group.close()


@ranks(1)
def test_close_tells_why_a_dropped_request_failed(comm: xccl.Communicator) -> None:
    comm.irecv(np.zeros(3, np.uint8), 0, 5)
    comm.send(np.zeros(4, np.uint8), 0, 5)
    for _ in range(2):
        with pytest.raises(xccl.XcclUsageError, match=r"nobody waited.*\n.* has 4 bytes, the buffer has 3"):
            comm.close()
        comm.recv(np.zeros(4, np.uint8), 0, 5)
        comm.irecv(np.zeros(3, np.uint8), 0, 5)
        comm.send(np.zeros(4, np.uint8), 0, 5)
        comm.isend(np.zeros(1), 0)  # takes note of the failure
        comm.recv(np.zeros(1), 0)
    with pytest.raises(xccl.XcclUsageError, match="nobody waited for had failed"):
        comm.close()
    comm.recv(np.zeros(4, np.uint8), 0, 5)


@ranks(2)
def test_rings_of_a_new_communicator_start_fresh(comm: xccl.Communicator) -> None:
    """Bug class 4: memory that a closed communicator's rings used holds no message of the past."""
    for turn in range(30):
        group = comm.split(0)
        assert group is not None
        other = 1 - group.rank
        assert group.iprobe() is None
        settle(group)
        requests = [group.isend(np.full(n, turn, np.uint8), other) for n in (8, 100, SLOT, LARGE)]
        for n in (8, 100, SLOT, LARGE):
            buffer = np.zeros(n, np.uint8)
            group.recv(buffer, other)
            assert (buffer == turn).all()
        for request in requests:
            request.wait()
        group.close()


@ranks(2)
def test_requests_outlive_a_discarded_communicator(comm: xccl.Communicator) -> None:
    group: Any = comm.split(0)
    requests = [group.irecv(np.zeros(8), 1 - comm.rank, 1)]
    for _ in range(3):
        requests.append(group.isend(np.zeros(LARGE, np.uint8), 1 - comm.rank, 2))
    del group, requests
    gc.collect()
    settle(comm)
