"""xccl.run: results, failures, deaths, time limits."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import xccl


def test_results_come_by_rank() -> None:
    factor = 3
    assert xccl.run(lambda comm, more: (comm.rank * factor + more, comm.size), 4, 10) == [
        (10, 4),
        (13, 4),
        (16, 4),
        (19, 4),
    ]


def test_large_results_arrive() -> None:
    for rank, result in enumerate(xccl.run(lambda comm: np.full(1_000_000, comm.rank), 2)):
        assert (result == rank).all()


def test_an_exception_ends_all_and_carries_its_traceback() -> None:
    def fail_on_one(comm: xccl.Communicator) -> None:
        if comm.rank == 1:
            raise KeyError("the reason")
        comm._sync(None)

    with pytest.raises(xccl.XcclAborted, match="rank 1 raised") as caught:
        xccl.run(fail_on_one, 3, timeout=30)
    assert caught.value.rank == 1
    assert "fail_on_one" in caught.value.traceback_text
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_others_learn_who_failed_and_why(tmp_path: Path) -> None:
    """Each survivor gets XcclAborted with the rank and its traceback."""

    def fail_on_one(comm: xccl.Communicator) -> None:
        if comm.rank == 1:
            raise KeyError("the reason")
        try:
            comm.barrier()
        except xccl.XcclAborted as error:
            (tmp_path / str(comm.rank)).write_text(f"{error.rank}\n{error.traceback_text}")
            raise

    with pytest.raises(xccl.XcclAborted):
        xccl.run(fail_on_one, 3, timeout=30)
    for rank in (0, 2):
        who, _, why = (tmp_path / str(rank)).read_text().partition("\n")
        assert who == "1"
        assert why.startswith("Traceback")
        assert why.rstrip().endswith("KeyError: 'the reason'")


@pytest.mark.parametrize("way", ["recv", "sync send", "request"])
def test_who_waits_in_a_message_learns_it_too(tmp_path: Path, way: str) -> None:
    """Their errors are kept in the request, with the rank that they are about."""

    def fail_on_one(comm: xccl.Communicator) -> None:
        if comm.rank == 1:
            time.sleep(0.3)
            raise KeyError("the reason")
        try:
            if way == "recv":
                comm.recv(np.empty(1), 1)
            elif way == "sync send":
                comm.send(np.ones(1), 1, mode="sync")
            else:
                comm.irecv(np.empty(1), 1).wait()
        except xccl.XcclAborted as error:
            (tmp_path / "told").write_text(f"{error.rank} {error.traceback_text}")
            raise

    with pytest.raises(xccl.XcclAborted):
        xccl.run(fail_on_one, 2, timeout=30)
    assert (tmp_path / "told").read_text().startswith("1 Traceback")


WAITING = """
import os, time, xccl
def wait(comm):
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(60) if comm.rank == 1 else comm.recv(__import__("numpy").empty(1), 1)
xccl.run(wait, 2)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ranks_end_with_their_parent(number: signal.Signals) -> None:
    """Ctrl-C goes to the ranks, too; only the parent says something."""
    parent = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert parent.stdout is not None
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    if number == signal.SIGINT:
        os.killpg(parent.pid, number)
    else:
        parent.send_signal(number)
    _, errors = parent.communicate(timeout=30)  # the pipes close with the last rank
    assert parent.returncode == -number
    assert errors.count("Traceback") == (number == signal.SIGINT)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_rank_is_named_and_ends_all(number: signal.Signals) -> None:
    def die(comm: xccl.Communicator) -> None:
        if comm.rank == 2:
            os.kill(os.getpid(), number)
        comm._sync(None)

    start = time.monotonic()
    with pytest.raises(xccl.XcclPeerLost, match=rf"rank 2 .* was killed by {number.name} in operation"):
        xccl.run(die, 4, timeout=30)
    assert time.monotonic() - start < 20  # an order of magnitude below the time limit: not a matter of speed


def test_a_rank_that_leaves_is_noticed_by_those_who_wait_for_it() -> None:
    def leave(comm: xccl.Communicator) -> str:
        if comm.rank == 0:
            return "left"
        with pytest.raises(xccl.XcclPeerLost, match=r"rank 0 is lost.*has left"):
            comm._sync(None)
        return "noticed"

    assert xccl.run(leave, 2, timeout=30) == ["left", "noticed"]


def test_the_time_limit_tells_what_ranks_do() -> None:
    def hang(comm: xccl.Communicator) -> None:
        if comm.rank == 1:
            time.sleep(60)
        comm._sync(None)

    with pytest.raises(xccl.XcclTimeout, match=r"(?s)2 of 2 ranks did not finish in 0.5 s.*rank 0 .*\(barrier\)"):
        xccl.run(hang, 2, timeout=0.5)


def test_output_goes_to_logs(tmp_path: Path) -> None:
    xccl.run(lambda comm: print(f"I am {comm.rank}"), 2, logs=tmp_path)
    assert [(tmp_path / f"rank-{rank}.log").read_text() for rank in (0, 1)] == ["I am 0\n", "I am 1\n"]


def test_worlds_nest_and_repeat() -> None:
    def outer(comm: xccl.Communicator) -> list[int]:
        return xccl.run(lambda inner: inner.size * 10 + comm.rank, 2)

    for _ in range(3):
        assert xccl.run(outer, 2) == [[20, 20], [21, 21]]


@pytest.mark.parametrize("nranks", [0, -1, 5000, 1.5])
def test_impossible_sizes_are_refused(nranks: int) -> None:
    with pytest.raises(xccl.XcclUsageError, match="number of ranks"):
        xccl.run(lambda comm: None, nranks)


# ---- why a rank died ----


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "killed by SIGSEGV"),
        (lambda: os.kill(os.getpid(), signal.SIGRTMIN + 3), f"killed by signal {signal.SIGRTMIN + 3}"),
        (lambda: os._exit(3), "exited with code 3"),
        (lambda: os._exit(0), "exited with code 0"),
    ],
)
def test_survivors_are_told_why_a_rank_died(end: Callable[[], None], cause: str) -> None:
    def lose(comm: xccl.Communicator) -> tuple[int, int, str, str]:
        if comm.rank == 1:
            end()
        with pytest.raises(xccl.XcclPeerLost) as caught:
            comm.barrier()
        again = pickle.loads(pickle.dumps(caught.value))
        return again.rank, again.pid, again.cause, str(again)

    first, lost, last = xccl.run(lose, 3, timeout=30, keep_going=True)
    assert (lost.rank, lost.cause.replace("SIGRTMIN+3", "signal 37")) == (1, cause)
    for told in (first, last):
        assert told[:3] == (1, lost.pid, cause)
        assert f"rank 1 (pid {lost.pid}, dead: {cause}): operation" in told[3]


def test_a_rank_killed_for_want_of_memory_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    kills = iter([5, 6, 6, 6])
    monkeypatch.setattr("xccl._exits.oom_kills", lambda: next(kills))

    def lose(comm: xccl.Communicator) -> str:
        if comm.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(xccl.XcclPeerLost) as caught:
            comm.barrier()
        return caught.value.cause

    told, lost = xccl.run(lose, 2, timeout=30, keep_going=True)
    assert told == lost.cause == "killed, out of memory"


def test_a_rank_that_left_in_order_has_no_cause() -> None:
    def leave(comm: xccl.Communicator) -> tuple[int, str]:
        if comm.rank == 0:
            return 0, ""
        with pytest.raises(xccl.XcclPeerLost, match="has left") as caught:
            comm.recv(np.empty(1), 0)
        return caught.value.rank, caught.value.cause

    assert xccl.run(leave, 2, timeout=30) == [(0, ""), (0, "")]


def test_the_cause_reaches_who_polls_a_request() -> None:
    def lose(comm: xccl.Communicator) -> str:
        if comm.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        request = comm.irecv(np.empty(1), 1)
        try:
            while not request.test():
                time.sleep(0.01)
        except xccl.XcclPeerLost as error:
            return error.cause
        return "it came"

    assert xccl.run(lose, 2, timeout=30, keep_going=True)[0] == "killed by SIGKILL"
