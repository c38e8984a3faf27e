"""Random programs of sends and receives; contents and order are checked.

A program is a list of messages in a global order. Message i may be sent from slot 3i, received at slot 3i + 1.
Sends may start earlier (isend) and end later, receives may be posted earlier (irecv) or end later. Every blocking
step then waits only for steps of earlier slots, so a program cannot deadlock unless the library makes it.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import xccl
from xccl import ANY_SOURCE, ANY_TAG

RING_SHAPES = [(256, 1), (256, 4), (4096, 2), (64 << 10, 8)]


@dataclass(frozen=True)
class Transfer:
    source: int
    dest: int
    tag: int
    nbytes: int
    symmetric: bool
    sync: bool
    send_early: int  # slots by which the send starts before its turn; 0 and send_late 0: blocking
    send_late: int
    receive_early: int
    receive_late: int


@contextlib.contextmanager
def ring_shape(slot_size: int, slots: int) -> Iterator[None]:
    xccl.rc.p2p_slot_size, xccl.rc.p2p_slots = slot_size, slots
    try:
        yield
    finally:
        del xccl.rc.p2p_slot_size, xccl.rc.p2p_slots


def sizes(slot_size: int, slots: int) -> st.SearchStrategy[int]:
    borders = [0, 1, 39, 40, 41, slot_size - 1, slot_size, slot_size + 1]
    borders += [slots * slot_size + d for d in (-1, 0, 1)] + [3 * slots * slot_size + 7]
    return st.one_of(st.sampled_from(borders), st.integers(0, min(4 * slots * slot_size, 3_000_000)))


@st.composite
def programs(draw: st.DrawFn) -> tuple[int, tuple[int, int], list[Transfer]]:
    nranks = draw(st.integers(1, 8))
    shape = draw(st.sampled_from(RING_SHAPES))
    shift = st.one_of(st.just(0), st.integers(0, 30))
    rank = st.integers(0, nranks - 1)
    transfer = st.builds(
        Transfer, rank, rank, st.integers(0, 3), sizes(*shape), st.booleans(), st.booleans(), shift, shift, shift, shift
    )
    return nranks, shape, draw(st.lists(transfer, min_size=1, max_size=40))


def content(index: int, nbytes: int) -> np.ndarray[Any, Any]:
    return (np.arange(nbytes, dtype=np.uint32) * (2 * index + 1) + index * 7).astype(np.uint8)


@dataclass
class Step:
    slot: int
    rank: int
    action: str  # "send", "isend", "recv", "irecv", "wait send", "wait recv"
    index: int


def plan(transfers: list[Transfer]) -> list[Step]:
    """Steps of all ranks by slot. Messages of one source, destination and tag start, and are posted, in order."""
    steps = []
    last_start: dict[tuple[int, int, int], int] = defaultdict(int)
    last_post: dict[tuple[int, int, int], int] = defaultdict(int)
    for i, t in enumerate(transfers):
        key = (t.source, t.dest, t.tag)
        turn = 3 * i
        start = last_start[key] = max(turn - t.send_early, last_start[key])
        post = last_post[key] = max(turn + 1 - t.receive_early, last_post[key])
        end = max(turn + t.send_late, post if t.sync or t.source == t.dest else turn)
        if t.send_early == t.send_late == 0 and start == turn and not (t.sync and t.source == t.dest):
            steps.append(Step(turn, t.source, "send", i))
        else:
            steps += [Step(start, t.source, "isend", i), Step(end + 1, t.source, "wait send", i)]
        if t.receive_early == t.receive_late == 0 and post == turn + 1:
            steps.append(Step(turn + 1, t.dest, "recv", i))
        else:
            steps += [Step(post, t.dest, "irecv", i), Step(turn + 1 + t.receive_late, t.dest, "wait recv", i)]
    return sorted(steps, key=lambda step: step.slot)


def perform(comm: xccl.Communicator, transfers: list[Transfer], steps: list[Step]) -> None:
    room = max(t.nbytes for t in transfers)
    symmetric = comm.zeros((len(transfers), max(room, 1)), np.uint8) if room * len(transfers) < 64 << 20 else None
    requests: dict[tuple[str, int], xccl.Request] = {}
    buffers: dict[int, np.ndarray[Any, Any]] = {}

    def check(index: int, message: xccl.Message) -> None:
        t = transfers[index]
        assert message == (t.source, t.tag, t.nbytes)
        assert np.array_equal(buffers.pop(index), content(index, t.nbytes)), f"message {index}: wrong content"

    for step in steps:
        if step.rank != comm.rank:
            continue
        t = transfers[step.index]
        if step.action in ("send", "isend"):
            data = content(step.index, t.nbytes)
            if t.symmetric and symmetric is not None:
                symmetric[step.index, : t.nbytes] = data
                data = symmetric[step.index, : t.nbytes]
            mode: Any = "sync" if t.sync else "default"
            if step.action == "send":
                comm.send(data, t.dest, t.tag, mode=mode)
            else:
                requests["send", step.index] = comm.isend(data, t.dest, t.tag, mode=mode)
        elif step.action in ("recv", "irecv"):
            buffers[step.index] = np.zeros(t.nbytes, np.uint8)
            if step.action == "recv":
                check(step.index, comm.recv(buffers[step.index], t.source, t.tag))
            else:
                requests["recv", step.index] = comm.irecv(buffers[step.index], t.source, t.tag)
        elif step.action == "wait recv":
            check(step.index, requests.pop(("recv", step.index)).wait())
        else:
            requests.pop(("send", step.index)).wait()
    assert not buffers


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(programs())
def test_random_programs_deliver_contents_in_order(program: tuple[int, tuple[int, int], list[Transfer]]) -> None:
    nranks, shape, transfers = program
    steps = plan(transfers)
    with ring_shape(*shape):
        xccl.run(perform, nranks, transfers, steps, timeout=60)


# ---- wildcards ----


def wild_messages(size: int, seed: int, count: int, largest: int) -> list[tuple[int, int, int, int]]:
    """(source, dest, tag, nbytes) of `count` messages of each rank, in each rank's order."""
    rng = np.random.default_rng([seed, size])
    nbytes = [8, 48, largest // 2, largest]
    return [
        (source, int(rng.integers(size)), int(rng.integers(3)), int(rng.choice(nbytes)))
        for source in range(size)
        for _ in range(count)
    ]


def receive_wild(comm: xccl.Communicator, seed: int, count: int, largest: int, kind: str) -> None:
    messages = wild_messages(comm.size, seed, count, largest)
    sends: list[xccl.Request] = []
    sequence: dict[tuple[int, int], int] = defaultdict(int)
    for source, dest, tag, nbytes in messages:
        if source == comm.rank:
            data = np.full(nbytes // 8, sequence[dest, tag], np.int64)
            sequence[dest, tag] += 1
            sends.append(comm.isend(data, dest, tag, mode="sync" if nbytes == 48 else "default"))
    mine = [(source, tag) for source, dest, tag, _ in messages if dest == comm.rank]
    next_of: dict[tuple[int, int], int] = defaultdict(int)
    patterns: dict[str, Callable[[tuple[int, int]], tuple[int, int]]] = {
        "any": lambda m: (ANY_SOURCE, ANY_TAG),
        "source": lambda m: (m[0], ANY_TAG),
        "tag": lambda m: (ANY_SOURCE, m[1]),
    }
    for pattern in map(patterns[kind], mine):
        found = comm.probe(*pattern)
        buffer = np.zeros(found.nbytes // 8, np.int64)
        message = comm.recv(buffer, found.source, found.tag)
        assert message == found
        assert (buffer == next_of[message.source, message.tag]).all(), "messages of one source and tag out of order"
        next_of[message.source, message.tag] += 1
    assert comm.iprobe() is None
    for send in sends:
        send.wait()


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 8),
    st.sampled_from(RING_SHAPES),
    st.integers(0, 2**32 - 1),
    st.integers(1, 30),
    st.sampled_from(["any", "source", "tag"]),
)
def test_wildcards_receive_every_message_once_in_order(
    nranks: int, shape: tuple[int, int], seed: int, count: int, kind: str
) -> None:
    with ring_shape(*shape):
        xccl.run(receive_wild, nranks, seed, count, 3 * shape[0], kind, timeout=60)
