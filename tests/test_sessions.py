"""`xccl ps`, `xccl gc` and what they read: sessions as seen from outside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xccl.sessions import RankState, Session, held_up_by, look, rates

# Rank 1 waits for 0, 0 for 2, 2 for 3, which sleeps outside xccl.
HANG = """
import time
import numpy as np
import xccl
comm = xccl.init()
for step in range(5):
    comm.barrier()
if comm.rank == 3:
    print("ready", comm._world.session, flush=True)
    time.sleep(100)
comm.recv(np.empty(1), [2, 0, 3][comm.rank])
"""
WAITS = [2, 0, 3, None]


@pytest.fixture
def hang(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Starts four ranks that hang; returns their launcher and the session."""
    program = tmp_path / "hang.py"
    program.write_text(HANG)
    started = []

    def start(*prefix: str) -> tuple[subprocess.Popen[str], str]:
        command = [*prefix, sys.executable, "-m", "xccl", "run", "-n", "4", str(program)]
        launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        started.append(launcher)
        assert launcher.stdout is not None
        session = launcher.stdout.readline().split()[1]
        _await(lambda: [rank.waits_for for rank in _look(session).ranks] == WAITS)
        return launcher, session

    yield start
    for launcher in started:
        launcher.send_signal(signal.SIGTERM)
        launcher.communicate(timeout=30)


def _look(session: str) -> Session:
    (found,) = look(session)
    return found


def _await(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _xccl(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-m", "xccl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_hang_is_explained_from_outside(hang: Callable[..., Any]) -> None:
    launcher, session = hang()
    found = _look(session)
    assert (found.size, found.creator_pid, found.aborted) == (4, launcher.pid, False)
    assert [rank.operation for rank in found.ranks] == ["recv"] * 3 + ["barrier"]
    assert [rank.sequence - found.ranks[3].sequence for rank in found.ranks] == [1, 1, 1, 0]
    assert all(rank.state == "alive" and rank.pid != launcher.pid for rank in found.ranks)
    assert held_up_by(found) == {3: 3}
    done = _xccl("ps", session[:8], "--interval", "0.1")
    assert done.returncode == 0
    assert "3 ranks wait for rank 3, at operation" in done.stdout
    assert "(barrier), which waits for nobody" in done.stdout


def test_json_has_the_same(hang: Callable[..., Any]) -> None:
    _, session = hang()
    (record,) = json.loads(_xccl("ps", session, "--json", "--interval", "0.1").stdout)
    assert [rank["waits_for"] for rank in record["ranks"]] == WAITS
    assert [rank["operations_per_s"] for rank in record["ranks"]] == [0.0] * 4
    assert record["held_up_by"] == {"3": 3}


def test_stopped_and_dead_ranks_show(hang: Callable[..., Any]) -> None:
    """The others are stopped first, so that none of them finds the death before the tool does."""
    launcher, session = hang()
    pids = [rank.pid for rank in _look(session).ranks]
    os.kill(launcher.pid, signal.SIGSTOP)
    try:
        for pid in pids[:3]:
            os.kill(pid, signal.SIGSTOP)
        _await(lambda: [rank.state for rank in _look(session).ranks] == ["stopped"] * 3 + ["alive"])
        os.kill(pids[3], signal.SIGKILL)
        _await(lambda: _look(session).ranks[3].state == "dead")
        assert "3 ranks wait for rank 3, which is dead" in _xccl("ps", session).stdout
    finally:
        for pid in [*pids[:3], launcher.pid]:
            os.kill(pid, signal.SIGCONT)


def test_no_right_to_trace_is_needed(hang: Callable[..., Any]) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv")
    prefix = ("setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all")
    if subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("no right to drop capabilities")
    _, session = hang(*prefix)
    assert "3 ranks wait for rank 3" in _xccl("ps", session, prefix=prefix).stdout


def test_rates_come_from_two_looks(tmp_path: Path) -> None:
    program = tmp_path / "busy.py"
    program.write_text(
        "import xccl\ncomm = xccl.init()\nif comm.rank == 0: print(comm._world.session, flush=True)\n"
        "while True: comm.barrier()\n"
    )
    command = [sys.executable, "-m", "xccl", "run", "-n", "2", str(program)]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert launcher.stdout is not None
    try:
        session = launcher.stdout.readline().strip()
        before = _look(session)
        _await(lambda: _look(session).ranks[0].sequence > before.ranks[0].sequence + 100)
        assert all(rate > 0 for rate in rates(before, _look(session)))
    finally:
        launcher.terminate()
        launcher.communicate(timeout=30)


def test_a_session_that_is_not_there_is_an_error() -> None:
    done = _xccl("ps", "0000none", "--interval", "0.01")
    assert done.returncode == 1
    assert "no session that begins with 0000none runs" in done.stderr


def test_gc_removes_what_the_dead_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XCCL_SHM_DIR", str(tmp_path))
    code = "from xccl._object import SharedObject; import os; SharedObject(1).publish('xccl-dead'); os._exit(1)"
    subprocess.run([sys.executable, "-c", code], timeout=30)
    assert _xccl("gc", "--dry-run").stdout == f"would remove {tmp_path}/xccl-dead\n"
    assert os.listdir(tmp_path) == ["xccl-dead"]
    assert _xccl("gc").stdout == f"removed {tmp_path}/xccl-dead\n"
    assert os.listdir(tmp_path) == []
    assert _xccl("gc", str(tmp_path)).stdout == f"nothing left by dead sessions in {tmp_path}\n"


# ---- who holds up whom ----


def _session(waits: list[int | None]) -> Session:
    ranks = [RankState(rank, "alive", 1, "barrier", 1, 0, peer, 0.0) for rank, peer in enumerate(waits)]
    return Session("s", len(ranks), 1, 0.0, False, 0.0, ranks)


@pytest.mark.parametrize(
    ("waits", "blame"),
    [
        ([None, None], {}),
        ([1, None], {1: 1}),
        ([1, 2, None, 2], {2: 3}),
        ([1, 0], {0: 1, 1: 1}),
        ([1, 0, 0], {0: 2, 1: 2}),
        ([1, None, 3, None], {1: 1, 3: 1}),
    ],
)
def test_chains_end_at_who_waits_for_nobody(waits: list[int | None], blame: dict[int, int]) -> None:
    assert held_up_by(_session(waits)) == blame


@given(st.integers(1, 8).flatmap(lambda n: st.lists(st.none() | st.integers(0, n - 1), min_size=n, max_size=n)))
def test_only_those_waited_for_are_blamed(waits: list[int | None]) -> None:
    blame = held_up_by(_session(waits))
    assert set(blame) <= set(waits)
    assert all(1 <= count < len(waits) for count in blame.values())
    waiting = [rank for rank, peer in enumerate(waits) if peer is not None and peer != rank]
    assert bool(blame) == bool(waiting)
