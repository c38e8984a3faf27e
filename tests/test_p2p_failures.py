"""Send and receive when something goes wrong: deadlines, interrupts, ranks that die or leave."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from support import ranks

import xccl
from xccl import ANY_SOURCE, ANY_TAG
from xccl._object import SharedObject
from xccl.launcher import launch_environment

pytestmark = pytest.mark.usefixtures("rings_of_512_kib")

SLOT, RING = 64 << 10, 8 * (64 << 10)
LARGE = 5 * RING + 3


def settle(comm: xccl.Communicator) -> None:
    """Returns when all ranks have called it."""
    comm._sync(None)


def await_flag(comm: xccl.Communicator, flag: np.ndarray[Any, Any]) -> None:
    """Returns when a peer has set this rank's flag. Makes no progress meanwhile."""
    while comm.atomic_fetch(flag, comm.rank) == 0:
        time.sleep(0.005)


# ---- deadlines ----


@ranks(3)
def test_receive_that_times_out_says_what_was_awaited_and_consumes_nothing(comm: xccl.Communicator) -> None:
    if comm.rank == 1:
        comm.send(np.array([5]), 0, 8)
        settle(comm)
    elif comm.rank == 0:
        comm.probe(1, 8)
        buffer = np.zeros(1, np.int64)
        with pytest.raises(xccl.XcclTimeout) as caught:
            comm.recv(buffer, 1, 7, timeout=0.05)
        text = str(caught.value)
        assert "rank 0: recv timed out" in text
        assert "message with tag 7 of rank 1" in text
        assert "rank 1 (pid" in text
        with pytest.raises(xccl.XcclTimeout, match="message with any tag from any source"):
            comm.irecv(buffer, ANY_SOURCE, ANY_TAG) and comm.probe(timeout=0.05)
        with pytest.raises(xccl.XcclTimeout):
            comm.recv(buffer, ANY_SOURCE, 9, timeout=0)
        assert buffer == 5
        settle(comm)
    else:
        settle(comm)


@ranks(2)
@pytest.mark.parametrize("nbytes", [8, 1000, LARGE])
def test_wait_that_times_out_leaves_the_request_pending(comm: xccl.Communicator, nbytes: int) -> None:
    if comm.rank == 0:
        received = np.zeros(nbytes, np.uint8)
        request = comm.irecv(received, 1)
        for _ in range(3):
            with pytest.raises(xccl.XcclTimeout, match="message with tag 0 of rank 1"):
                request.wait(timeout=0.01)
        assert request.test() is None
        settle(comm)
        assert request.wait() == (1, 0, nbytes)
        assert (received == 3).all()
    else:
        settle(comm)
        comm.send(np.full(nbytes, 3, np.uint8), 0)


@ranks(2)
@pytest.mark.parametrize("again", ["same", "any", "probe", "irecv"])
def test_receive_that_times_out_halfway_loses_nothing(comm: xccl.Communicator, again: str) -> None:
    """The sender fills the ring and then stays away, so the message comes in two halves."""
    data = np.arange(LARGE, dtype=np.uint32).astype(np.uint8)
    flag = comm.zeros(1, np.int64)
    if comm.rank == 0:
        request = comm.isend(data, 1, 6)
        comm.atomic_swap(flag, 1, 1)
        await_flag(comm, flag)
        request.wait()
    else:
        received = np.zeros(LARGE, np.uint8)
        await_flag(comm, flag)
        with pytest.raises(xccl.XcclTimeout):
            comm.recv(received, 0, 6, timeout=0.05)
        received[:] = 0
        comm.atomic_swap(flag, 1, 0)
        if again == "probe":
            assert comm.probe() == (0, 6, LARGE)
        if again == "irecv":
            assert comm.irecv(received, 0, 6).wait() == (0, 6, LARGE)
        elif again == "any":
            assert comm.recv(received, ANY_SOURCE, ANY_TAG) == (0, 6, LARGE)
        else:
            comm.recv(received, 0, 6)
        assert np.array_equal(received, data)


@ranks(2)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("posted", [False, True])
@pytest.mark.parametrize("queued", [False, True])
def test_send_that_times_out_withdraws_its_message(
    comm: xccl.Communicator, symmetric: bool, posted: bool, queued: bool
) -> None:
    """Bug class 11: the buffer is the caller's again, so nobody may read it any more.

    `queued`: behind another message, not yet begun. `posted`: a receive takes the first part, and then waits again.
    """
    buffer = comm.full(LARGE, 1, np.uint8) if symmetric else np.full(LARGE, 1, np.uint8)
    flag = comm.zeros(1, np.int64)
    if comm.rank == 0:
        await_flag(comm, flag)
        other = [comm.isend(np.full(LARGE, 8, np.uint8), 1, 1)] if queued else []
        with pytest.raises(xccl.XcclTimeout, match="rank 0: send timed out"):
            comm.send(buffer, 1, 5, timeout=0.05)
        buffer[:] = 2
        comm.atomic_swap(flag, 1, 1)
        comm.send(buffer, 1, 5)
        for request in other:
            request.wait()
    else:
        received, aside = np.zeros(LARGE, np.uint8), np.zeros(LARGE, np.uint8)
        receive = comm.irecv(received, ANY_SOURCE, 5) if posted else None
        comm.atomic_swap(flag, 1, 0)
        await_flag(comm, flag)
        message = receive.wait() if receive else comm.recv(received, 0, 5)
        assert message == (0, 5, LARGE)
        assert (received == 2).all()
        if queued:
            assert comm.recv(aside, 0, ANY_TAG).tag == 1
            assert (aside == 8).all()
    settle(comm)
    assert comm.iprobe() is None


@ranks(2)
def test_receive_whose_message_is_withdrawn_gets_its_place_back(comm: xccl.Communicator) -> None:
    flag = comm.zeros(1, np.int64)
    if comm.rank == 0:
        await_flag(comm, flag)
        with pytest.raises(xccl.XcclTimeout):
            comm.send(np.zeros(LARGE, np.uint8), 1, timeout=0.05)
        comm.atomic_swap(flag, 1, 1)
        for i in (1, 2):
            comm.send(np.full(LARGE, i, np.uint8), 1)
    else:
        buffers = np.zeros((2, LARGE), np.uint8)
        requests = [comm.irecv(buffer, 0) for buffer in buffers]
        comm.atomic_swap(flag, 1, 0)
        await_flag(comm, flag)
        for i, request in enumerate(requests):
            request.wait()
            assert (buffers[i] == i + 1).all()


@ranks(2)
@pytest.mark.parametrize("symmetric", [False, True])
def test_withdrawn_message_in_the_unexpected_queue_is_forgotten(comm: xccl.Communicator, symmetric: bool) -> None:
    buffer = comm.full(LARGE, 1, np.uint8) if symmetric else np.full(LARGE, 1, np.uint8)
    flag = comm.zeros(1, np.int64)
    if comm.rank == 0:
        with pytest.raises(xccl.XcclTimeout):
            comm.send(buffer, 1, 5, timeout=0.2)
        comm.atomic_swap(flag, 1, 1)
        comm.send(np.array([1]), 1, 6)
        settle(comm)
    else:
        if symmetric:
            with pytest.raises(xccl.XcclTimeout):
                comm.recv(buffer, 0, 9, timeout=0.02)  # moves the offer aside
        await_flag(comm, flag)
        comm.recv(np.zeros(1, np.int64), 0, 6)
        assert comm.iprobe() is None
        with pytest.raises(xccl.XcclTimeout):
            comm.recv(np.zeros(LARGE, np.uint8), 0, 5, timeout=0)
        settle(comm)


@ranks(2)
def test_sync_send_that_times_out_after_arrival_is_still_delivered(comm: xccl.Communicator) -> None:
    for turn in range(70):  # the lines of acknowledgements are not reused before they are free
        if comm.rank == 0:
            with pytest.raises(xccl.XcclTimeout, match="acknowledgement for 100 bytes with tag 2 of rank 1"):
                comm.send(np.full(100, turn, np.uint8), 1, 2, mode="sync", timeout=0)
            settle(comm)
            comm.send(np.full(8, turn, np.uint8), 1, 3, mode="sync")
        else:
            buffer = np.zeros(100, np.uint8)
            settle(comm)
            comm.recv(buffer[:8], 0, 3)
            comm.recv(buffer, 0, 2)
            assert (buffer == turn).all()


@ranks(1)
def test_interrupt_ends_a_receive_and_leaves_the_communicator_usable(comm: xccl.Communicator) -> None:
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    buffer = np.zeros(1, np.int64)
    with pytest.raises(KeyboardInterrupt):
        comm.recv(buffer, 0, timeout=30)
    comm.send(np.array([4]), 0)
    comm.recv(buffer, 0)
    assert buffer == 4


# ---- ranks that die ----


def run_unwatched(fn: Callable[[xccl.Communicator], Any], nranks: int) -> list[Any]:
    """As xccl.run, but nobody tells the others when a rank dies. A rank that died has result None."""
    shared = SharedObject(nranks)
    context = multiprocessing.get_context("fork")

    def main(rank: int, results: Any) -> None:
        os.environ.update(launch_environment(shared, rank, nranks))
        results.send(fn(xccl.init()))
        results.close()
        os._exit(0)

    processes = []
    for rank in range(nranks):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=main, args=(rank, theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append((process, ours))
    shared.close()
    results: list[Any] = []
    for process, ours in processes:
        try:
            results.append(ours.recv() if ours.poll(60) else "hangs")
        except EOFError:
            results.append(None)
        process.kill()
        process.join()
        process.close()
        ours.close()
    return results


def lost(call: Callable[[], Any]) -> tuple[str, float]:
    """Message of the XcclPeerLost that `call` raises, and after how many seconds."""
    start = time.monotonic()
    try:
        call()
    except xccl.XcclPeerLost as error:
        return str(error), time.monotonic() - start
    except Exception as error:
        return f"not lost: {error!r}", 0.0
    return "not lost: nothing raised", 0.0


def poll(request: xccl.Request) -> None:
    while request.test() is None:
        pass


BLOCKED: dict[str, Callable[[xccl.Communicator], Any]] = {
    "send": lambda comm: comm.send(np.zeros(LARGE, np.uint8), 1),
    "sync": lambda comm: comm.send(np.zeros(8), 1, mode="sync"),
    "zero-copy": lambda comm: comm.send(comm.shared, 1),  # type: ignore[attr-defined]
    "isend": lambda comm: comm.isend(np.zeros(LARGE, np.uint8), 1).wait(),
    "recv": lambda comm: comm.recv(np.zeros(8), 1),
    "recv any": lambda comm: comm.recv(np.zeros(8), ANY_SOURCE),
    "irecv": lambda comm: comm.irecv(np.zeros(8), 1).wait(),
    "test": lambda comm: poll(comm.irecv(np.zeros(8), 1)),
    "probe": lambda comm: comm.probe(1),
    "close": lambda comm: (comm.isend(np.zeros(LARGE, np.uint8), 1), comm.close()),
}


@pytest.mark.parametrize("operation", BLOCKED)
def test_death_of_the_peer_ends_the_wait(operation: str) -> None:
    def main(comm: xccl.Communicator) -> Any:
        comm.shared = comm.zeros(LARGE, np.uint8)  # type: ignore[attr-defined]
        settle(comm)
        if comm.rank == 1:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        return lost(lambda: BLOCKED[operation](comm))

    text, seconds = run_unwatched(main, 3)[0]
    assert "rank 1 is lost" in text
    assert seconds < 5


def test_death_in_the_middle_of_a_message_ends_the_receive() -> None:
    def main(comm: xccl.Communicator) -> Any:
        flag = comm.zeros(1, np.int64)
        if comm.rank == 1:
            comm.isend(np.zeros(LARGE, np.uint8), 0)  # fills the ring
            comm.atomic_swap(flag, 1, 0)
            os.kill(os.getpid(), signal.SIGKILL)
        await_flag(comm, flag)
        return lost(lambda: comm.recv(np.zeros(LARGE, np.uint8), ANY_SOURCE))

    text, _ = run_unwatched(main, 2)[0]
    assert "rank 1 is lost" in text


def test_messages_of_a_rank_that_has_left_are_received() -> None:
    def main(comm: xccl.Communicator) -> Any:
        if comm.rank == 1:
            comm.send(np.array([1]), 0, 1)
            comm.send(np.array([2] * 100), 0, 2)
            comm.close()
            return None
        time.sleep(0.2)
        one, two = np.zeros(1, np.int64), np.zeros(100, np.int64)
        comm.recv(two, ANY_SOURCE, 2)
        comm.recv(one, 1, 1)
        texts = [lost(partial(comm.recv, one, source))[0] for source in (1, ANY_SOURCE)]
        return one.tolist(), two.tolist(), *texts

    one, two, named, anybody = run_unwatched(main, 2)[0]
    assert one == [1]
    assert two == [2] * 100
    assert "rank 1 is lost" in named
    assert "has left" in named
    assert "rank 1 is lost" in anybody


def test_receive_from_anybody_goes_on_while_somebody_is_left() -> None:
    def main(comm: xccl.Communicator) -> Any:
        buffer = np.zeros(1, np.int64)
        if comm.rank == 1:
            comm.close()
        elif comm.rank == 2:
            time.sleep(0.5)
            comm.send(np.array([7]), 0)
        else:
            comm.recv(buffer, ANY_SOURCE)
        return int(buffer[0])

    assert run_unwatched(main, 3) == [7, 0, 0]
