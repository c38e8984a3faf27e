"""Send and receive: contents, order, matching, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ranks

import xccl
from xccl import ANY_SOURCE, ANY_TAG

pytestmark = pytest.mark.usefixtures("rings_of_512_kib")

INLINE, SLOT, RING = 40, 64 << 10, 8 * (64 << 10)
SIZES = [0, 1, 8, INLINE - 1, INLINE, INLINE + 1, 4096, SLOT - 1, SLOT, SLOT + 1, RING - 1, RING, RING + 1, 3_000_001]


@pytest.fixture
def small_slots() -> Iterator[None]:
    """Slots of 256 bytes, two to a ring: every border is near."""
    xccl.rc.p2p_slot_size, xccl.rc.p2p_slots = 256, 2
    yield
    del xccl.rc.p2p_slot_size, xccl.rc.p2p_slots


def content(nbytes: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def with_sentinel(nbytes: int) -> np.ndarray[Any, Any]:
    """An array with a byte behind it that nobody may write."""
    a = np.zeros(nbytes + 1, np.uint8)
    a[-1] = 0xA5
    return a


@ranks(2, 3)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("mode", ["default", "sync"])
def test_every_size_arrives_intact(comm: xccl.Communicator, symmetric: bool, mode: Any) -> None:
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    memory = comm.zeros(max(SIZES) + 8, np.uint8) if symmetric else np.zeros(max(SIZES) + 8, np.uint8)
    for turn, nbytes in enumerate(SIZES):
        message = memory[3 : 3 + nbytes]  # not aligned
        message[...] = content(nbytes, turn * 100 + comm.rank)
        received = with_sentinel(nbytes)
        request = comm.isend(message, to, turn, mode=mode)
        got = comm.recv(received[:-1], source, turn)
        assert got == (source, turn, nbytes)
        assert np.array_equal(received[:-1], content(nbytes, turn * 100 + source))
        assert received[-1] == 0xA5
        assert request.wait() == (comm.rank, turn, nbytes)


@ranks(2)
def test_any_dtype_and_shape_travels_as_its_bytes(comm: xccl.Communicator) -> None:
    other = 1 - comm.rank
    for dtype in ("float64", "complex128", "int8", "bool", "datetime64[s]", "S5", [("a", "i4"), ("b", "f8")]):
        sent = np.frombuffer(content(np.dtype(dtype).itemsize * 12, 1).tobytes(), dtype).reshape(3, 4)
        received = np.zeros_like(sent)
        request = comm.isend(sent, other)
        comm.recv(received, other)
        request.wait()
        assert received.tobytes() == sent.tobytes()
    scalar = np.array(3.5)
    request = comm.isend(scalar, other)
    received = np.zeros((1,))
    comm.recv(received, other)
    request.wait()
    assert received == 3.5


@ranks(1, 2, 4)
def test_messages_of_one_source_and_tag_stay_in_order(comm: xccl.Communicator) -> None:
    """One stream through all three ways: inline, chunks, zero-copy."""
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    nbytes = [8, 100, SLOT, 8, SLOT + 8, 48, RING + 8] * 3
    big = comm.zeros((len(nbytes), max(nbytes) // 8), np.int64)
    requests = []
    for i, n in enumerate(nbytes):
        big[i] = i
        requests.append(comm.isend(big[i, : n // 8] if i % 2 else np.full(n // 8, i), to, 7))
    for i, n in enumerate(nbytes):
        received = np.zeros(n // 8, np.int64)
        comm.recv(received, source, 7)
        assert (received == i).all()
    for request in reversed(requests):
        request.wait()


@ranks(2)
def test_tags_out_of_order_never_deadlock(comm: xccl.Communicator) -> None:
    """More messages than the ring has room for lie before the one that is received first."""
    sizes = [0, 8, 1000, SLOT, 200_000, RING * 2] * 30
    if comm.rank == 0:
        for request in [comm.isend(np.full(n, tag % 251, np.uint8), 1, tag) for tag, n in enumerate(sizes)]:
            request.wait()
    else:
        for tag, n in reversed(list(enumerate(sizes))):
            received = np.zeros(n, np.uint8)
            comm.recv(received, 0, tag)
            assert (received == tag % 251).all()


@ranks(1, 3)
def test_sends_to_the_own_rank_work(comm: xccl.Communicator) -> None:
    for nbytes in SIZES:
        sent, received = content(nbytes, nbytes), np.zeros(nbytes, np.uint8)
        comm.send(sent, comm.rank, 5)  # returns although nobody has received yet
        assert comm.recv(received, comm.rank, 5) == (comm.rank, 5, nbytes)
        assert np.array_equal(sent, received)
        posted = comm.irecv(received, ANY_SOURCE, ANY_TAG)
        comm.send(sent, comm.rank, 6, mode="sync")
        assert posted.test() == (comm.rank, 6, nbytes)
    sync = comm.isend(sent, comm.rank, 8, mode="sync")
    assert sync.test() is None
    comm.recv(received, comm.rank, 8)
    assert sync.test() == (comm.rank, 8, nbytes)
    with pytest.raises(xccl.XcclUsageError, match="would wait for itself"):
        comm.send(sent, comm.rank, 9, mode="sync")
    assert comm.iprobe() is None


@ranks(2)
def test_sync_send_returns_after_the_receive(comm: xccl.Communicator) -> None:
    flag, other = comm.zeros(1, np.int64), 1 - comm.rank
    for nbytes in [0, 8, 1000, SLOT, RING + 1]:
        comm._sync(None)
        if comm.rank == 0:
            comm.send(np.ones(nbytes, np.uint8), 1, mode="sync")
            assert comm.atomic_fetch(flag, 1) == nbytes + 1, "returned before the receiver had the message"
        else:
            time.sleep(0.02)
            flag[0] = nbytes + 1
            comm.recv(np.zeros(nbytes, np.uint8), other)


@ranks(2)
def test_acknowledgements_out_of_order_reach_their_own_messages(comm: xccl.Communicator) -> None:
    """Bug class 3: "k were received" is not "this one was received"."""
    count = 80  # more than one page of acknowledgement lines holds
    if comm.rank == 0:
        requests = [comm.isend(np.full(n, i, np.uint8), 1, i, mode="sync") for i, n in enumerate([0, 8, 64, 600] * 20)]
        for i in reversed(range(count)):
            requests[i].wait()
            comm.send(np.array([i]), 1, 1000)
            assert all(request.test() is None for request in requests[:i])
            comm.send(np.array([i]), 1, 1001)
    else:
        step = np.zeros(1, np.int64)
        for i in reversed(range(count)):
            comm.recv(np.zeros([0, 8, 64, 600][i % 4], np.uint8), 0, i)
            comm.recv(step, 0, 1000)
            comm.recv(step, 0, 1001)
            assert step == i


@ranks(2)
def test_acknowledgements_that_come_together_reach_their_own_messages(comm: xccl.Communicator) -> None:
    count = 150
    for _ in range(2):
        if comm.rank == 0:
            requests = [comm.isend(np.full(8, i), 1, i, mode="sync") for i in range(count)]
            while comm.iprobe(1) is None:
                time.sleep(0.001)
            comm.recv(np.zeros(1), 1)
            for request in requests:
                request.wait(timeout=10)
        else:
            buffer = np.zeros(8, np.int64)
            for i in range(0, count, 2):
                comm.recv(buffer, 0, i)
            for i in range(1, count, 2):
                comm.recv(buffer, 0, i)
            comm.send(np.zeros(1), 0)


@ranks(2)
def test_wrong_size_is_refused_and_the_message_stays(comm: xccl.Communicator) -> None:
    symmetric = comm.full(RING * 2, 7, np.uint8)
    for nbytes in [0, 8, INLINE + 1, SLOT, RING * 2]:
        for wrong in [nbytes + 1, max(nbytes - 1, 1)]:
            for source in (symmetric[:nbytes], np.full(nbytes, 7, np.uint8)):
                comm._sync(None)
                if comm.rank == 0:
                    comm.send(source, 1, 11)
                    continue
                buffer = np.zeros(wrong, np.uint8)
                text = f"message from rank 0 with tag 11 has {nbytes} bytes, the buffer has {wrong}"
                with pytest.raises(xccl.XcclUsageError, match=text):
                    comm.recv(buffer, ANY_SOURCE, 11)
                request = comm.irecv(buffer, 0, ANY_TAG)
                with pytest.raises(xccl.XcclUsageError, match=text):
                    request.wait()
                with pytest.raises(xccl.XcclUsageError, match=text):
                    request.test()
                assert not buffer.any()
                assert comm.probe() == (0, 11, nbytes)
                received = np.zeros(nbytes, np.uint8)
                comm.recv(received, 0, 11)
                assert (received == 7).all()


@ranks(3)
def test_probe_tells_what_recv_would_take(comm: xccl.Communicator) -> None:
    if comm.rank > 0:
        for tag, nbytes in [(3, 10), (4, 100_000), (3, 20), (5, RING * 2)]:
            comm.send(np.full(nbytes, comm.rank, np.uint8), 0, tag * 10 + comm.rank)
        return
    for source, tag, nbytes in [(2, 32, 10), (1, 51, RING * 2), (2, 42, 100_000), (1, 31, 10), (2, 32, 20)]:
        assert comm.probe(source, tag) == (source, tag, nbytes)
        assert comm.probe(ANY_SOURCE, tag) == comm.iprobe(source, tag) == (source, tag, nbytes)
        comm.recv(np.zeros(nbytes, np.uint8), source, tag)
    left = {(1, 41, 100_000), (1, 31, 20), (2, 52, RING * 2)}
    while left:
        message = comm.probe()
        comm.recv(np.zeros(message.nbytes, np.uint8), message.source, message.tag)
        left.remove(message)
    assert comm.iprobe() is None


@ranks(2)
def test_probe_passes_over_what_a_posted_receive_will_take(comm: xccl.Communicator) -> None:
    if comm.rank == 0:
        for i in range(2):
            comm.send(np.array([i]), 1, 5)
        return
    buffer = np.zeros(1, np.int64)
    posted = comm.irecv(buffer, 0, 5)
    assert comm.probe(0, 5) == (0, 5, 8)
    assert posted.test() == (0, 5, 8)
    assert buffer == 0
    comm.recv(buffer, 0, 5)
    assert buffer == 1


@ranks(2, 4)
def test_posted_receives_match_in_posting_order(comm: xccl.Communicator) -> None:
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    buffers = np.full((6, 1), -1, np.int64)
    wanted = [(source, 2), (ANY_SOURCE, 1), (source, ANY_TAG), (ANY_SOURCE, ANY_TAG), (source, 1), (source, 2)]
    requests = [comm.irecv(buffers[i], *what) for i, what in enumerate(wanted)]
    comm._sync(None)
    for tag, value in [(1, 10), (1, 11), (2, 20), (3, 30), (1, 12), (2, 21)]:
        comm.send(np.array([value]), to, tag)
    messages = [request.wait() for request in requests]
    assert buffers[:, 0].tolist() == [20, 10, 11, 30, 12, 21]
    assert [message.tag for message in messages] == [2, 1, 1, 3, 1, 2]


@ranks(4)
def test_any_source_takes_turns(comm: xccl.Communicator) -> None:
    count = 60  # as many as the rings have room for
    if comm.rank > 0:
        for i in range(count):
            comm.send(np.array([i]), 0)
        comm._sync(None)
        return
    comm._sync(None)
    seen = dict.fromkeys((1, 2, 3), 0)
    buffer = np.zeros(1, np.int64)
    for turn in range(1, 3 * count + 1):
        source = comm.recv(buffer, ANY_SOURCE).source
        assert buffer == seen[source], "messages of one source out of order"
        seen[source] += 1
        # All three have messages waiting, so none may be passed over.
        assert max(seen.values()) == -(-turn // 3)


@ranks(4)
def test_communicators_with_equal_tags_do_not_mix(comm: xccl.Communicator) -> None:
    """Bug class 2."""
    groups = [comm, comm.split(0), comm.split(comm.rank % 2), comm.split(0, -comm.rank)]
    requests, buffers = [], []
    for k, group in enumerate(groups):
        assert group is not None
        to = (group.rank + 1) % group.size
        for n in (8, 5000, SLOT * 2):
            requests.append(group.isend(np.full(n, 10 * k + group.rank, np.uint8), to, 1))
    for k in reversed(range(len(groups))):
        group = groups[k]
        assert group is not None
        source = (group.rank - 1) % group.size
        for n in (8, 5000, SLOT * 2):
            buffers.append((np.zeros(n, np.uint8), 10 * k + source))
            requests.append(group.irecv(buffers[-1][0], source, 1))
    for request in requests:
        request.wait()
    for buffer, expected in buffers:
        assert (buffer == expected).all()
    for group in groups[1:]:
        assert group is not None
        group.close()


@ranks(3)
def test_more_communicators_than_hooks_were_once_allowed_make_progress(comm: xccl.Communicator) -> None:
    groups = [comm.split(0) for _ in range(20)]
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    sends = [group.isend(np.full(RING * 2, k, np.uint8), to) for k, group in enumerate(groups) if group]
    for k, group in reversed(list(enumerate(groups))):
        assert group is not None
        received = np.zeros(RING * 2, np.uint8)
        group.recv(received, source)
        assert (received == k).all()
    for send in sends:
        send.wait()


def test_small_slots_carry_large_messages(small_slots: None) -> None:
    def exchange(comm: xccl.Communicator) -> None:
        to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        for nbytes in [41, 255, 256, 257, 511, 512, 513, 100_003]:
            sent, received = content(nbytes, comm.rank), np.zeros(nbytes, np.uint8)
            request = comm.isend(sent, to)
            comm.recv(received, source)
            request.wait()
            assert np.array_equal(received, content(nbytes, source))

    xccl.run(exchange, 4, timeout=60)


@ranks(1)
def test_bad_arguments_are_named(comm: xccl.Communicator) -> None:
    a = np.zeros(4)
    bad: list[tuple[str, Any]] = [
        ("rank 3 is not in this communicator of 1 ranks", lambda: comm.send(a, 3)),
        ("rank -1 is not in this communicator", lambda: comm.send(a, ANY_SOURCE)),
        ("rank -7 is not in this communicator", lambda: comm.recv(a, -7)),
        ("a tag is a number >= 0, got -1", lambda: comm.send(a, 0, ANY_TAG)),
        ("a tag is a number >= 0 or ANY_TAG, got -2", lambda: comm.recv(a, 0, -2)),
        ("mode is one of default, sync, got 'fast'", lambda: comm.send(a, 0, mode="fast")),  # type: ignore[arg-type]
        ("dest must be an integer, got float", lambda: comm.send(a, 0.0)),  # type: ignore[arg-type]
        ("tag must be an integer, got str", lambda: comm.isend(a, 0, "x")),  # type: ignore[arg-type]
        ("dest is too large", lambda: comm.send(a, 2**40)),
        ("tag is too large", lambda: comm.send(a, 0, 2**63)),
        ("buf must be a NumPy array, got list", lambda: comm.send([1], 0)),  # type: ignore[arg-type]
        ("buf must be C-contiguous", lambda: comm.send(np.zeros((4, 4))[:, 1], 0)),
        ("buf is read-only", lambda: comm.recv(np.frombuffer(b"abc", np.uint8), 0)),
        ("Python objects cannot be shared", lambda: comm.irecv(np.array([None]), 0)),
    ]
    for text, call in bad:
        with pytest.raises(xccl.XcclUsageError, match=text):
            call()
    comm.send(a, np.int64(0), np.uint8(3))
    assert comm.recv(a, 0, 3) == (0, 3, 32)
    comm.send(a, 0, 2**63 - 1)
    assert comm.recv(a, 0, 2**63 - 1).tag == 2**63 - 1


def test_more_than_two_gibibytes() -> None:
    nbytes = (1 << 31) + (1 << 20) + 5
    marks = [0, (1 << 31) - 1, 1 << 31, nbytes - 1]
    meminfo = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in meminfo if line.startswith("MemAvailable"))
    if free < 3 * nbytes:
        pytest.skip(f"needs {3 * nbytes >> 30} GB of free memory")

    def transfer(comm: xccl.Communicator) -> None:
        a = np.zeros(nbytes, np.uint8)
        if comm.rank == 0:
            a[marks] = [1, 2, 3, 4]
            comm.send(a, 1)
        else:
            assert comm.probe(0).nbytes == nbytes
            assert comm.recv(a, 0).nbytes == nbytes
            assert a[marks].tolist() == [1, 2, 3, 4]
            assert np.count_nonzero(a) == 4

    xccl.run(transfer, 2, timeout=250)
