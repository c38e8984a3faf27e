"""Messages over a socket whose other end is slow, or gone."""

import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xccl.serving.link import Cancel, Link, Tokens, Wake

MESSAGES = st.one_of(
    st.builds(Wake, st.integers(0, 2**40)),
    st.builds(Cancel, st.integers(0, 2**40)),
    st.builds(Tokens, st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)), st.just([])),
)


@given(messages=st.lists(MESSAGES, max_size=20), cuts=st.lists(st.integers(1, 50), min_size=1))
def test_messages_arrive_whole_and_in_order_however_the_bytes_are_cut(messages, cuts):
    ours, wire = socket.socketpair()
    wire_out, theirs = socket.socketpair()
    with ours, wire, wire_out, theirs:
        sender, receiver = Link(ours), Link(theirs)
        for message in messages:
            sender.send(message)
        ours.shutdown(socket.SHUT_WR)
        got = []
        for number in range(10**6):
            data = wire.recv(cuts[number % len(cuts)])
            if not data:
                break
            wire_out.sendall(data)
            got += receiver.receive()
        assert got == messages


def test_a_sender_never_waits_and_loses_nothing():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender, receiver = Link(ours), Link(theirs)
        messages = [Tokens([number] * 500, [number] * 500, []) for number in range(2000)]
        for message in messages:
            sender.send(message)
        assert sender.has_backlog
        got = []
        while len(got) < len(messages):
            got += receiver.receive()
            sender.flush()
        assert not sender.has_backlog
        assert got == messages


def test_wait_sends_what_was_kept_and_ends_when_something_comes():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender, receiver = Link(ours), Link(theirs)
        for number in range(2000):
            sender.send(Tokens([number] * 500, [], []))
        waiting = threading.Thread(target=sender.wait)
        waiting.start()
        count = 0
        while count < 2000:
            count += len(receiver.receive())
        receiver.send(Wake(1))
        waiting.join(30)
        assert not waiting.is_alive()
        assert sender.receive() == [Wake(1)]


def test_a_closed_end_is_told_after_its_last_message():
    ours, theirs = socket.socketpair()
    sender, receiver = Link(ours), Link(theirs)
    sender.send(Wake(3))
    sender.close()
    assert receiver.receive() == [Wake(3)]
    receiver.wait()
    with pytest.raises(EOFError):
        receiver.receive()
    receiver.send(Wake(4))
    assert not receiver.has_backlog
    receiver.close()
