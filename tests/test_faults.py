"""xccl.faults: plans, where they strike, and what the others do then."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fault_matrix
import numpy as np
import pytest
from fault_matrix import PROGRAMS, Cell, all_cells, run_cell
from hypothesis import given
from hypothesis import strategies as st

import xccl
from xccl.faults import ACTIONS, OPERATIONS, Fault, dump, inject, load, random_plan

SEED = 4  # of the cells that are tried here; `make soak-faults` tries all


def some_cells(program: str) -> list[Cell]:
    """Each point and action of the program, on a rank that the seed chooses."""
    rng = random.Random(f"{SEED} {program}")
    cells: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in all_cells(program):
        fault = cell.fault
        cells.setdefault((fault.operation, fault.phase, fault.nth, fault.action), []).append(cell)
    return [rng.choice(choices) for choices in cells.values()]


@pytest.mark.parametrize("program", PROGRAMS)
def test_whatever_strikes_a_rank_the_others_finish_or_say_why(program: str) -> None:
    wrong = {str(cell): problem for cell in some_cells(program) if (problem := run_cell(cell)[1])}
    assert not wrong, "\n".join(f"{cell}: {problem}" for cell, problem in wrong.items())


def test_the_matrix_has_every_operation() -> None:
    """An operation that is added gets faults, too."""
    struck = {cell.fault.operation for cell in all_cells()}
    one_sided = {"put", "get", "atomic"}  # as put_signal
    not_here = {"init", "wait", "ExpertParallel", "AttentionExpert", *one_sided}
    assert struck == set(OPERATIONS) - not_here


def test_a_hang_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix itself can fail: a delay beyond its limit is a hang."""
    monkeypatch.setattr(fault_matrix, "HANG", 1.5)
    cell = Cell("barrier", Fault(1, "barrier", "delay", ms=6000.0))
    assert "XcclTimeout" in run_cell(cell)[1]


# ---- where they strike ----


def test_kill_is_named_with_its_cause() -> None:
    def gather(comm: xccl.Communicator) -> None:
        for _ in range(5):
            comm.all_gather(np.ones(3))

    def work(comm: xccl.Communicator) -> tuple[int, int, str]:
        with pytest.raises(
            xccl.XcclPeerLost, match=r"dead: killed by SIGKILL\): operation \d+ \(all_gather\)"
        ) as caught:
            gather(comm)
        return caught.value.rank, caught.value.pid, caught.value.cause

    with inject([Fault(1, "all_gather", "kill", nth=3)]):
        first, lost, last = xccl.run(work, 3, keep_going=True, timeout=60)
    assert first == last == (1, lost.pid, "killed by SIGKILL")
    assert (lost.rank, lost.cause) == (1, "killed by SIGKILL")


def test_nth_counts_visits_of_the_point() -> None:
    def work(comm: xccl.Communicator) -> list[int]:
        failed = []
        for i in range(6):
            try:
                comm.barrier()
            except xccl.XcclInjected:
                failed.append(i)
                comm.barrier()
        return failed

    with inject([Fault(0, "barrier", "raise", nth=2), Fault(0, "barrier", "raise", nth=5)]):
        # a barrier that failed was the second, the one made instead of it the third
        assert xccl.run(work, 2, timeout=60) == [[1, 3], []]


def test_each_time() -> None:
    def work(comm: xccl.Communicator) -> int:
        failed = 0
        for _ in range(4):
            try:
                comm.wait_until(comm.signal(), "==", 0)
            except xccl.XcclInjected:
                failed += 1
        return failed

    with inject([Fault(0, "wait_until", "raise", nth=0)]):
        assert xccl.run(work, 1) == [4]


def test_a_raise_while_it_waits_leaves_the_error_path_of_a_wait() -> None:
    """As a timeout would: the receive consumes nothing, and can be made again."""

    def work(comm: xccl.Communicator) -> None:
        if comm.rank == 0:
            time.sleep(0.3)
            comm.send(np.ones(2), 1)
            return
        with pytest.raises(xccl.XcclInjected, match="rank 1: recv fails as planned, as it comes to wait"):
            comm.recv(np.empty(2), 0)
        comm.recv(np.empty(2), 0)

    with inject([Fault(1, "recv", "raise", phase="wait")]):
        xccl.run(work, 2, timeout=60)


def test_an_injected_error_that_nobody_catches_ends_the_world() -> None:
    with inject([Fault(1, "all_reduce", "raise")]), pytest.raises(xccl.XcclAborted, match="rank 1 raised") as caught:
        xccl.run(lambda comm: comm.all_reduce(np.ones(2)), 3, timeout=60)
    assert caught.value.rank == 1
    assert isinstance(caught.value.__cause__, xccl.XcclInjected)


def test_a_stop_with_an_end_goes_on_by_itself() -> None:
    def work(comm: xccl.Communicator) -> float:
        start = time.monotonic()
        comm.barrier()
        return time.monotonic() - start

    with inject([Fault(0, "barrier", "stop", ms=200.0)]):
        assert min(xccl.run(work, 2, timeout=60)) > 0.1  # a lower bound: it did stop


def test_a_delay_is_waited_for() -> None:
    def work(comm: xccl.Communicator) -> float:
        start = time.monotonic()
        comm.all_reduce(np.ones(3))
        return time.monotonic() - start

    with inject([Fault(1, "all_reduce", "delay", ms=200.0)]):
        assert min(xccl.run(work, 2, timeout=60)) > 0.1


def test_inject_inside_a_rank_holds_for_the_block() -> None:
    def work(comm: xccl.Communicator) -> None:
        comm.barrier()
        with inject([Fault(0, "barrier", "raise")]):
            if comm.rank == 0:
                with pytest.raises(xccl.XcclInjected):
                    comm.barrier()
        comm.barrier()

    xccl.run(work, 2, timeout=60)


def test_blocks_nest() -> None:
    def work(comm: xccl.Communicator) -> list[str]:
        seen = []
        for _ in range(2):
            try:
                comm.barrier()
            except xccl.XcclInjected as error:
                seen.append(str(error))
        return seen

    with inject([Fault(0, "barrier", "raise", nth=1)]):
        with inject([]):
            assert xccl.run(work, 1) == [[]]
        assert len(xccl.run(work, 1)[0]) == 1
    assert xccl.run(work, 1) == [[]]


def test_threads_can_be_delayed_but_not_killed() -> None:
    plan = [Fault(1, "barrier", "delay", ms=1.0), Fault(0, "barrier", "raise", nth=2)]
    with inject(plan), pytest.raises(xccl.XcclAborted, match="barrier fails as planned"):
        xccl.run(lambda comm: [comm.barrier() for _ in range(3)], 2, host="threads", timeout=60)
    with inject([Fault(1, "barrier", "kill")]), pytest.raises(xccl.XcclAborted, match="a thread cannot be killed"):
        xccl.run(lambda comm: comm.barrier(), 2, host="threads", timeout=60)


@pytest.mark.parametrize("operation", ["put", "get", "put_signal", "signal_op", "atomic"])
def test_one_sided_operations_are_struck_before_anything_happens(operation: str) -> None:
    def work(comm: xccl.Communicator) -> None:
        a, s, count = comm.zeros(4), comm.signal(), comm.zeros(1, np.uint64)
        calls = {
            "put": lambda: comm.put(a, np.ones(4), 0),
            "get": lambda: comm.get(np.empty(4), a, 0),
            "put_signal": lambda: comm.put_signal(a, np.ones(4), 0, signal=s, value=1),
            "signal_op": lambda: comm.signal_op(s, 1, 0),
            "atomic": lambda: comm.atomic_fetch_add(count, 1, 0),
        }
        with pytest.raises(xccl.XcclInjected, match=f"{operation} fails as planned"):
            calls[operation]()
        assert (a[0], s.value, count[0]) == (0, 0, 0)
        calls[operation]()

    with inject([Fault(0, operation, "raise")]):
        xccl.run(work, 1)


# ---- plans ----

faults = st.builds(
    Fault,
    rank=st.integers(0, 100),
    operation=st.sampled_from([*OPERATIONS, "any"]),
    action=st.sampled_from(ACTIONS),
    phase=st.one_of(st.integers(0, 5), st.just("wait")),
    nth=st.integers(0, 1000),
    ms=st.floats(0, 1e6),
    word=st.integers(0, 7),
    bits=st.integers(0, (1 << 64) - 1),
)


@given(st.lists(faults, max_size=4))
def test_a_plan_survives_json(plan: list[Fault]) -> None:
    assert load(dump(plan)) == tuple(plan)


def test_a_plan_comes_from_a_file(tmp_path: Path) -> None:
    plan = [Fault(2, "dispatch", "stop", phase=1, ms=5.0)]
    (tmp_path / "plan.json").write_text(dump(plan))
    assert load(tmp_path / "plan.json") == load(str(tmp_path / "plan.json")) == tuple(plan)


@given(st.integers(), st.integers(1, 9))
def test_a_seed_gives_one_plan(seed: int, nranks: int) -> None:
    plan = random_plan(seed, nranks, count=3)
    assert plan == random_plan(seed, nranks, count=3)
    assert all(fault.rank < nranks for fault in plan)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("[{", "JSON list"),
        ("/nowhere/plan.json", "neither a JSON list nor a file"),
        ('{"rank": 1}', "a list of faults"),
        ("[3]", "fault 0 of the plan: an object"),
        ([{"rank": 1, "operation": "barrier"}], "action is missing"),
        ([{"rank": 1, "operation": "barier", "action": "kill"}], "one of any, init, split.*got 'barier'"),
        ([{"rank": 1, "operation": "barrier", "action": "burn"}], "kill, stop, delay, raise, corrupt; got 'burn'"),
        ([{"rank": 1, "operation": "barrier", "action": "kill", "phase": "now"}], 'a number >= 0 or "wait"'),
        ([{"rank": 1, "operation": "barrier", "action": "kill", "when": 1}], r"unknown \['when'\]; there are rank"),
        ([{"rank": -1, "operation": "barrier", "action": "kill"}], "rank is a number from 0"),
        ([{"rank": 1, "operation": "barrier", "action": "corrupt", "word": 8}], "word is a number from 0 to 7"),
        ([{"rank": 1, "operation": "barrier", "action": "delay", "ms": -1}], "ms is a number"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(plan: Any, said: str) -> None:
    with pytest.raises(xccl.XcclUsageError, match=said), inject(plan):
        pass


# ---- xccl run, and pytest ----

PROGRAM = """
import numpy as np, xccl
comm = xccl.init()
try:
    for _ in range(5):
        comm.all_reduce(np.ones(2))
except xccl.XcclPeerLost as error:
    print(comm.rank, "lost", error.rank, error.cause)
    comm = comm.shrink()
    print(comm.all_reduce(np.ones(1)))
"""


def run_program(tmp_path: Path, plan: str, *command: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "prog.py").write_text(PROGRAM)
    return subprocess.run(
        [sys.executable, "-m", "xccl", "run", "--keep-going", "-n", "3", *command],
        env={"PATH": "/usr/bin:/bin", "XCCL_FAULTS": plan},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )


KILL = json.dumps([{"rank": 1, "operation": "all_reduce", "action": "kill", "nth": 2, "phase": "wait"}])


def test_xccl_run_takes_a_plan_from_its_variable(tmp_path: Path) -> None:
    done = run_program(tmp_path, KILL, "prog.py")
    assert sorted(done.stdout.splitlines()) == [
        "0 lost 1 killed by SIGKILL",
        "2 lost 1 killed by SIGKILL",
        "[2.]",
        "[2.]",
    ], done.stderr
    assert "rank 1" in done.stderr
    assert "was killed by SIGKILL in operation" in done.stderr


def test_a_bad_plan_is_told_before_any_rank_starts(tmp_path: Path) -> None:
    done = run_program(tmp_path, '[{"rank": 1}]', "prog.py")
    assert done.returncode != 0
    assert "operation, action is missing" in done.stderr
    assert not done.stdout


PYTEST = """
import numpy as np, xccl

def test_a_loss(inject_faults):
    plan = inject_faults([{"rank": 1, "operation": "all_reduce", "action": "raise"}])
    assert plan[0].rank == 1
    xccl.run(lambda comm: comm.all_reduce(np.ones(1)), 2)

def test_it_is_over():
    xccl.run(lambda comm: comm.all_reduce(np.ones(1)), 2)
"""


def test_the_fixture_holds_for_its_test_and_shows_the_plan(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(PYTEST)
    command = [sys.executable, "-m", "pytest", "-p", "xccl.pytest_plugin", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "1 failed, 1 passed" in done.stdout
    assert '[{"rank": 1, "operation": "all_reduce", "action": "raise"}]' in done.stdout
