"""Operation x phase x action x rank: a fault strikes one rank, and the others must finish or raise the right error.

    python tests/fault_matrix.py                 # all cells
    python tests/fault_matrix.py --only split    # of one program
    python tests/fault_matrix.py --cell 17       # one of them, as its number was printed

A cell is a world of its own. In it a program makes one operation again and again, one rank is struck, and every rank
reports what came of it. A rank that hangs is found by the time limit, far beyond every deadline in the cell.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import xccl
from xccl.faults import Action, Fault

ROUNDS = 3
PATIENCE = 30.0  # of operations that must not time out
SHORT = 0.4  # deadline of an operation whose peer does not come
OPENING = 3.0  # of a shrink in which a rank fails half way: the others miss it until then
HANG = 60.0  # beyond all other times

Step = Callable[[float], None]


def expect(condition: object, what: str = "a wrong result") -> None:
    if not condition:
        raise ArithmeticError(what)


# ---- programs: each makes what it needs, and gives one round ----


def put_signal(comm: xccl.Communicator) -> Step:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    a, arrived, taken = comm.zeros(100), comm.signal(), comm.signal()
    rounds = 0

    def step(timeout: float) -> None:
        nonlocal rounds
        again(
            "put_signal",
            lambda: comm.put_signal(a, np.full(100, comm.rank + 1.0), right, signal=arrived, value=1, op="add"),
        )
        rounds += 1
        again("wait_until", lambda: comm.wait_until(arrived, ">=", rounds, timeout=timeout))
        expect((a == left + 1).all())
        again("signal_op", lambda: comm.signal_op(taken, 1, left, op="add"))
        again("wait_until", lambda: comm.wait_until(taken, ">=", rounds, timeout=timeout))

    return step


def exchange(count: int, mode: str = "default") -> Callable[[xccl.Communicator], Step]:
    def prepare(comm: xccl.Communicator) -> Step:
        right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        x, got = np.full(count, float(comm.rank)), np.empty(count)

        def step(timeout: float) -> None:
            # even ranks send first, the last of an odd number receives first: no circle
            def send() -> None:
                again("send", lambda: comm.send(x, right, 7, mode=mode, timeout=timeout))

            def receive() -> None:
                got.fill(-1)
                again("recv", lambda: comm.recv(got, left, 7, timeout=timeout))
                expect((got == left).all())

            for half in (send, receive) if comm.rank % 2 == 0 and comm.rank != comm.size - 1 else (receive, send):
                half()

        return step

    return prepare


def collective(name: str, count: int) -> Callable[[xccl.Communicator], Step]:
    def prepare(comm: xccl.Communicator) -> Step:
        n, rank = comm.size, comm.rank
        x = np.repeat(np.arange(n, dtype=float) + 10 * rank, count)
        calls: dict[str, tuple[Callable[[float], Any], Any]] = {
            "barrier": (lambda t: comm.barrier(timeout=t), None),
            "broadcast": (lambda t: comm.broadcast(x.copy(), 0, timeout=t)[0], 0.0),
            "all_gather": (lambda t: comm.all_gather(x, timeout=t)[:, 0].tolist(), [10.0 * pe for pe in range(n)]),
            "all_reduce": (lambda t: comm.all_reduce(x, timeout=t)[0], 10.0 * sum(range(n))),
            "reduce_scatter": (
                lambda t: comm.reduce_scatter(x, timeout=t)[0],
                n * rank + 10.0 * sum(range(n)),
            ),
            "all_to_all": (
                lambda t: comm.all_to_all(x, timeout=t)[::count].tolist(),
                [rank + 10.0 * pe for pe in range(n)],
            ),
            "all_to_all_v": (
                lambda t: comm.all_to_all_v(x, [count] * n, timeout=t)[::count].tolist(),
                [rank + 10.0 * pe for pe in range(n)],
            ),
        }
        call, right = calls[name]

        def step(timeout: float) -> None:
            expect(again(name, lambda: call(timeout)) == right)

        return step

    return prepare


def moe(comm: xccl.Communicator) -> Step:
    ep = xccl.ExpertParallel(comm, num_experts=5, hidden=16, num_topk=2, num_max_tokens_per_rank=8, dtype="float32")
    x = np.full((4, 16), float(comm.rank + 1), np.float32)
    idx = np.array([[0, 4], [1, -1], [2, 3], [-1, -1]])

    def usable() -> bool:
        return not ep._failure  # what failed in its second half cannot be made again

    def step(timeout: float) -> None:
        rows, handle = again("dispatch", lambda: ep.dispatch(x, idx, timeout=timeout), usable)
        out = again("combine", lambda: ep.combine(rows, handle, timeout=timeout), usable)
        expect(out[:, 0].tolist() == [2.0 * x[0, 0], x[0, 0], 2.0 * x[0, 0], 0.0])

    return step


def attention_experts(comm: xccl.Communicator) -> Step:
    """Each rank attends in its turn, to experts on the others."""
    x = np.full((4, 16), float(comm.rank + 1), np.float32)
    idx = np.array([[0, 4], [1, -1], [2, 3], [-1, -1]])
    groups = [
        xccl.AttentionExpert(comm, [pe], sorted({0, 1, 2} - {pe}), 5, 16, 2, 8, dtype="float32")
        for pe in range(comm.size)
    ]

    def step(timeout: float) -> None:
        for pe, ae in enumerate(groups):

            def usable(ae: xccl.AttentionExpert = ae) -> bool:
                return not ae._failure

            if comm.rank == pe:
                again("a2e", lambda ae=ae: ae.a2e(x, idx), usable)
                out = again("e2a", lambda ae=ae: ae.e2a(timeout=timeout), usable)
                expect(out[:, 0].tolist() == [2.0 * x[0, 0], x[0, 0], 2.0 * x[0, 0], 0.0])
            else:
                rows, handle = again("a2e_recv", lambda ae=ae: ae.a2e_recv(timeout=timeout), usable)
                again(
                    "e2a_send",
                    lambda ae=ae, rows=rows, handle=handle: ae.e2a_send(rows, handle, timeout=timeout),
                    usable,
                )

    return step


def masks(comm: xccl.Communicator) -> Step:
    ep = xccl.ExpertParallel(comm, num_experts=5, hidden=16, num_topk=2, num_max_tokens_per_rank=8, dtype="float32")

    def step(timeout: float) -> None:
        again("set_alive", lambda: ep.set_alive([True] * comm.size, timeout=timeout))

    return step


def split(comm: xccl.Communicator) -> Step:
    def step(timeout: float) -> None:
        group = again("split", lambda: comm.split(comm.rank % 2, timeout=timeout))
        expect(group.all_reduce(np.ones(3), timeout=timeout)[0] == group.size)
        group.close(timeout=timeout)

    return step


def heap(comm: xccl.Communicator) -> Step:
    def step(timeout: float) -> None:
        a = again("allocation", lambda: comm.zeros(1000, timeout=timeout))
        expect((a == 0).all())
        a[:] = 1
        again("free", lambda: comm.free(a, timeout=timeout))

    return step


def shrink(comm: xccl.Communicator) -> Step:
    """The last rank dies first, so that the others have something to shrink for."""
    if comm.rank == comm.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with_dead = comm

    def step(timeout: float) -> None:
        nonlocal with_dead
        if with_dead.size == comm.size:
            try:
                while True:
                    with_dead.barrier(timeout=PATIENCE)
            except xccl.XcclPeerLost:
                with_dead = again("shrink", lambda: comm.shrink(timeout=timeout))
        expect(with_dead.all_reduce(np.ones(3), timeout=timeout)[0] == with_dead.size)

    return step


def again(operation: str, call: Callable[[], Any], may: Callable[[], bool] = lambda: True) -> Any:
    """A call that a fault refused as it began has done nothing: it may be made again."""
    try:
        return call()
    except xccl.XcclInjected as error:
        if f": {operation} fails as planned, as it begins" not in str(error) or not may():
            raise
        return call()


@dataclass(frozen=True)
class Program:
    """A program, and the points of it where faults may strike."""

    prepare: Callable[[xccl.Communicator], Step]
    points: tuple[tuple[str, int | str, int], ...]  # operation, phase, nth
    nranks: int = 3


def _both(operation: str) -> tuple[tuple[str, int | str, int], ...]:
    return (operation, 0, 2), (operation, "wait", 2)


_HEAP = (("allocation", 0, 1), ("allocation", "wait", 1), ("free", 0, 2), ("free", "wait", 1))
_SENDING = (("send", 0, 2), ("recv", 0, 1), ("recv", "wait", 1))

_APART = (
    ("a2e", 0, 2),
    ("a2e_recv", 0, 2),
    ("a2e_recv", "wait", 1),
    ("e2a_send", 0, 2),
    ("e2a", 0, 2),
    ("e2a", "wait", 1),
)

PROGRAMS = {
    "put_signal": Program(put_signal, (("put_signal", 0, 2), ("signal_op", 0, 1), *_both("wait_until"))),
    "send": Program(exchange(4), _SENDING),
    "send ring": Program(exchange(2000), _SENDING),
    "send sync": Program(exchange(100, "sync"), (*_SENDING, ("send", "wait", 1))),
    "send large": Program(exchange(700_000), (*_SENDING, ("send", "wait", 1))),
    "barrier": Program(collective("barrier", 1), _both("barrier")),
    "attention and experts": Program(attention_experts, _APART),
    "broadcast": Program(collective("broadcast", 500), _both("broadcast")),
    "all_gather": Program(collective("all_gather", 2), _both("all_gather")),
    "all_gather large": Program(collective("all_gather", 60_000), (*_both("all_gather"), ("all_gather", "wait", 5))),
    "all_reduce": Program(collective("all_reduce", 2), _both("all_reduce")),
    "all_reduce large": Program(collective("all_reduce", 60_000), (*_both("all_reduce"), ("all_reduce", "wait", 5))),
    "reduce_scatter": Program(collective("reduce_scatter", 300), _both("reduce_scatter")),
    "all_to_all": Program(collective("all_to_all", 2), _both("all_to_all")),
    "all_to_all large": Program(collective("all_to_all", 60_000), (*_both("all_to_all"), ("all_to_all", "wait", 5))),
    "all_to_all_v": Program(collective("all_to_all_v", 300), _both("all_to_all_v")),
    "dispatch": Program(moe, (("dispatch", 0, 1), ("dispatch", 0, 2), ("dispatch", 1, 2), ("dispatch", "wait", 2))),
    "combine": Program(
        moe, (("combine", 0, 1), ("combine", 0, 2), ("combine", 1, 2), ("combine", 2, 1), ("combine", "wait", 2))
    ),
    "set_alive": Program(masks, _both("set_alive")),
    "split": Program(split, (*_both("split"), ("allocation", 0, 2), ("allocation", "wait", 1), ("close", 0, 1))),
    "heap": Program(heap, _HEAP),
    "shrink": Program(
        shrink, (("shrink", 0, 1), ("shrink", "wait", 1), ("shrink", "wait", 2), ("allocation", 0, 1)), 4
    ),
}

ACTIONS: tuple[Action, ...] = ("kill", "stop", "delay", "raise", "corrupt")


@dataclass(frozen=True)
class Cell:
    """One program, and one fault in it."""

    program: str
    fault: Fault

    def __str__(self) -> str:
        return f"{self.program}: {xccl.faults.dump([self.fault])}"


def all_cells(program: str | None = None) -> list[Cell]:
    cells = []
    for name, one in PROGRAMS.items():
        rng = random.Random(name)
        for operation, phase, nth in one.points:
            for action in ACTIONS:
                for rank in range(one.nranks - (name == "shrink")):
                    corrupts = {"word": rng.randrange(4), "bits": 1 << rng.choice([0, 4, 12, 20, 31, 40, 63])}
                    more = {"corrupt": corrupts, "stop": {"ms": 0.0}, "delay": {"ms": 30.0}}.get(action, {})
                    fault = Fault(rank, operation, action, phase=phase, nth=nth, **more)  # type: ignore[arg-type]
                    cells.append(Cell(name, fault))
    return [cell for cell in cells if program in (None, cell.program)]


# ---- one cell ----


@dataclass(frozen=True)
class Report:
    """What a rank came to: "finished", or the name of what it raised."""

    outcome: str
    text: str = ""
    lost: int = -1
    cause: str = ""
    survivors: int = 0  # of shrink, after a death
    total: float = 0.0  # of all_reduce among them


class Bystanders:
    """Wakes the stopped rank when all others are through: memory that the ranks share outside xccl."""

    def __init__(self, cell: Cell, nranks: int) -> None:
        self.others = nranks - 1 - (cell.program == "shrink")
        self.through = multiprocessing.Value(ctypes.c_int, 0)
        self.victim = multiprocessing.Value(ctypes.c_int, 0)

    def leave(self) -> None:
        with self.through.get_lock():
            self.through.value += 1
            last = self.through.value == self.others
        if last and self.victim.value:
            os.kill(self.victim.value, signal.SIGCONT)


def _main(comm: xccl.Communicator, cell: Cell, bystanders: Bystanders) -> Report:
    fault, struck = cell.fault, comm.rank == cell.fault.rank
    if struck and fault.action == "stop":
        bystanders.victim.value = os.getpid()
    step = PROGRAMS[cell.program].prepare(comm)
    if cell.program != "shrink":
        comm.barrier(timeout=PATIENCE)
    timeout = SHORT if fault.action in ("stop", "corrupt") else PATIENCE
    if (cell.program, fault.action) == ("shrink", "raise"):
        timeout = OPENING
    report = Report("finished")
    try:
        with xccl.faults.inject([fault]):
            for _ in range(ROUNDS):
                step(timeout)
    except (xccl.XcclError, ArithmeticError) as error:
        if isinstance(error, ArithmeticError) and fault.action != "corrupt":
            raise
        if isinstance(error, xccl.XcclInjected):
            comm.abort("".join(traceback.format_exception(error)))
        lost = error if isinstance(error, xccl.XcclPeerLost) else xccl.XcclPeerLost("")
        report = Report(type(error).__name__, str(error), lost.rank, lost.cause)
    if not struck and fault.action == "stop":
        bystanders.leave()
    if fault.action == "kill":
        survivors = newest(comm).shrink(timeout=PATIENCE)
        total = survivors.all_reduce(np.ones(3000), timeout=PATIENCE)
        report = Report(report.outcome, report.text, report.lost, report.cause, survivors.size, total[-1])
    leave(newest(comm))
    return report


def newest(comm: xccl.Communicator) -> xccl.Communicator:
    return comm if comm._survivors is None else newest(comm._survivors)


def leave(comm: xccl.Communicator) -> None:
    """Closes it; or, as after an exception that ends a program, leaves it as it is."""
    try:
        comm.close(timeout=SHORT)
    except xccl.XcclError:
        comm._discard()
        comm._c = None
        comm._entry.close()
        comm._world.detach()


# ---- what is right ----


def run_cell(cell: Cell) -> tuple[str, str]:
    """What came of the rank that was struck, and what is wrong; nothing if all is right."""
    nranks = PROGRAMS[cell.program].nranks
    bystanders = Bystanders(cell, nranks)
    try:
        results = xccl.run(_main, nranks, cell, bystanders, timeout=HANG, keep_going=True)
    except xccl.XcclError as error:
        return "?", f"{type(error).__name__}: {error}"
    if cell.program == "shrink":
        results.pop()
    struck = results[cell.fault.rank]
    outcome = struck.cause if isinstance(struck, xccl.XcclPeerLost) else struck.outcome
    others = [result for rank, result in enumerate(results) if rank != cell.fault.rank]
    lost = [str(other) for other in others if not isinstance(other, Report)]
    if lost:
        return outcome, f"a bystander died: {lost}"
    problems = [RIGHT[cell.fault.action](cell, outcome, other, len(results)) for other in others]
    return outcome, "; ".join(problem for problem in problems if problem)


def after_kill(cell: Cell, struck: str, other: Report, nranks: int) -> str:
    left = nranks - (struck == "killed by SIGKILL")
    if (other.survivors, other.total) != (left, left):
        return f"{left} ranks live, shrink found {other.survivors}, all_reduce gave {other.total}"
    named = (other.lost, other.cause) == (cell.fault.rank, "killed by SIGKILL")
    return "" if other.outcome == "finished" or (other.outcome == "XcclPeerLost" and named) else str(other)


def after_stop(cell: Cell, struck: str, other: Report, nranks: int) -> str:
    # a bystander that has given up may be missed by the next
    follows = other.outcome == "XcclPeerLost" and other.lost not in (-1, cell.fault.rank)
    told = other.outcome == "XcclTimeout" and "stopped" in other.text
    return "" if other.outcome == "finished" or told or follows else str(other)


def after_delay(cell: Cell, struck: str, other: Report, nranks: int) -> str:
    return "" if (struck, other.outcome) == ("finished", "finished") else f"{struck}, {other}"


def after_raise(cell: Cell, struck: str, other: Report, nranks: int) -> str:
    told = other.outcome == "XcclAborted" and f"rank {cell.fault.rank} ended the world" in other.text
    if cell.program == "shrink" and struck != "finished":
        # who fails inside waits for the others before it may say so: all run into the deadline, which names it
        told = told or other.outcome in ("XcclTimeout", "XcclPeerLost")
        struck = "XcclInjected" if struck in ("XcclTimeout", "XcclPeerLost") else struck
    right = struck == "XcclInjected" and told
    return "" if right or (struck in ("finished", "XcclInjected") and other.outcome == "finished") else str(other)


def after_corrupt(cell: Cell, struck: str, other: Report, nranks: int) -> str:
    return ""  # any result and any error of xccl: that nobody died or hung has been seen


RIGHT = {
    "kill": after_kill,
    "stop": after_stop,
    "delay": after_delay,
    "raise": after_raise,
    "corrupt": after_corrupt,
}


def main() -> int:
    """Runs cells; exit code 1 if one went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PROGRAMS, help="cells of this program")
    parser.add_argument("--action", choices=ACTIONS)
    parser.add_argument("--cell", type=int, help="the number of one cell")
    options = parser.parse_args()
    begin = time.monotonic()
    ran = missed = 0
    bad: list[int] = []
    for number, cell in enumerate(all_cells()):
        if options.cell not in (None, number) or options.only not in (None, cell.program):
            continue
        if options.action not in (None, cell.fault.action):
            continue
        outcome, problem = run_cell(cell)
        ran += 1
        missed += cell.fault.action == "kill" and outcome != "killed by SIGKILL"
        if problem:
            bad.append(number)
            print(f"cell {number}, {cell}: {outcome}: {problem}", flush=True)
    print(f"{ran} cells in {time.monotonic() - begin:.0f} s, {missed} kills missed, {len(bad)} wrong {bad or ''}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
