"""Faults on purpose: a plan says which rank fails where and how, so that a test can see what the others do.

    plan = [Fault(rank=1, operation="all_reduce", action="kill")]
    with xccl.faults.inject(plan):
        xccl.run(serve, 4, keep_going=True)

The same plan as JSON serves programs that one cannot change: `XCCL_FAULTS=plan.json xccl run -n 4 prog.py`. With pytest
there is a fixture, see `xccl.pytest_plugin`.

A fault strikes when its rank comes for the nth time to a phase of an operation; operation and phase are those that
`xccl ps` and every message show. It is counted from when the communicator of all ranks is open, or from `inject` if
that comes later. Off, each of these points costs one predicted branch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from xccl._binding import check, ffi, integer, lib
from xccl._world import World
from xccl.errors import XcclUsageError
from xccl.options import rc

Action = Literal["kill", "stop", "delay", "raise", "corrupt"]

_ACTIONS: dict[str, int] = {
    "kill": lib.XCCL_FAULT_KILL,
    "stop": lib.XCCL_FAULT_STOP,
    "delay": lib.XCCL_FAULT_DELAY,
    "raise": lib.XCCL_FAULT_RAISE,
    "corrupt": lib.XCCL_FAULT_CORRUPT,
}
ACTIONS: tuple[str, ...] = tuple(_ACTIONS)


def _operations() -> Iterator[str]:
    number = 0
    while (name := lib.xccl_fault_operation(number)) != ffi.NULL:
        yield ffi.string(name).decode()
        number += 1


OPERATIONS: tuple[str, ...] = tuple(_operations())
"""What `operation` may name: the operations as `xccl ps` shows them, and put, get, put_signal, signal_op and atomic."""

ANY = "any"


@dataclass(frozen=True)
class Fault:
    """One fault of a plan.

    Attributes
    ----------
    rank : int
        World rank that it strikes.
    operation : str
        One of OPERATIONS, or "any". Operations that make use of others count, too: split allocates.
    action : str
        "kill": SIGKILL. "stop": SIGSTOP; the rank goes on after `ms`. "delay": it sleeps for `ms`. "raise": the call
        raises XcclInjected. "corrupt": `bits` of a control word that it publishes next to another rank are flipped.
    phase : int or "wait"
        The operation's own phase, 0 when it begins: nothing has happened then, so a call that raises there may be made
        again. "wait": when it comes to wait for others, having published what it can.
    nth : int
        Strikes the nth time that the rank comes there, from 1. 0: each time.
    ms : float
        Milliseconds for "stop" and "delay". A stop of 0 lasts until somebody sends SIGCONT.
    word, bits : int
        For "corrupt". Word 0 is the one that publishes its control line (event id, epoch, sequence, signal), 1 to 7 are
        those behind it (offset, count and so on).
    """

    rank: int
    operation: str
    action: Action
    phase: int | Literal["wait"] = 0
    nth: int = 1
    ms: float = 100.0
    word: int = 0
    bits: int = 1 << 20

    def __post_init__(self) -> None:
        if self.operation != ANY and self.operation not in OPERATIONS:
            raise XcclUsageError(f"a fault's operation is one of any, {', '.join(OPERATIONS)}; got {self.operation!r}")
        if self.action not in _ACTIONS:
            raise XcclUsageError(f"a fault's action is one of {', '.join(ACTIONS)}; got {self.action!r}")
        if self.phase != "wait" and (not isinstance(self.phase, int) or self.phase < 0):
            raise XcclUsageError(f'a fault\'s phase is a number >= 0 or "wait", got {self.phase!r}')
        for name, least, most in (("rank", 0, 1 << 31), ("nth", 0, 1 << 63), ("word", 0, 8), ("bits", 0, 1 << 64)):
            value = integer(getattr(self, name), name, "a fault", bits=66)
            if not least <= value < most:
                raise XcclUsageError(f"a fault's {name} is a number from {least} to {most - 1}, got {value}")
        if not isinstance(self.ms, int | float) or not 0 <= self.ms < 1e12:
            raise XcclUsageError(f"a fault's ms is a number of milliseconds >= 0, got {self.ms!r}")


Plan = Sequence[Fault | Mapping[str, Any]]


def load(source: str | os.PathLike[str] | Plan) -> tuple[Fault, ...]:
    """A plan from JSON, from a file with JSON, or from what is one already.

    JSON is a list of objects with the attributes of Fault: `[{"rank": 1, "operation": "barrier", "action": "kill"}]`.
    Raises XcclUsageError that says what is wrong, and in which fault.
    """
    if isinstance(source, str | os.PathLike):
        source = _parse(source)
    if not isinstance(source, Iterable) or isinstance(source, Mapping):
        raise XcclUsageError(f"a plan of faults is a list of faults, got {type(source).__name__}")
    return tuple(fault if isinstance(fault, Fault) else _fault(i, fault) for i, fault in enumerate(source))


def _parse(source: str | os.PathLike[str]) -> Any:
    text = str(source).strip()
    if not text.startswith(("[", "{")):
        try:
            text = Path(source).read_text()
        except OSError as error:
            raise XcclUsageError(
                f"XCCL_FAULTS={text}: neither a JSON list nor a file with one ({error.strerror})"
            ) from None
    try:
        return json.loads(text)
    except ValueError as error:
        raise XcclUsageError(f"a plan of faults is a JSON list of objects: {error}") from None


def _fault(index: int, attributes: Any) -> Fault:
    if not isinstance(attributes, Mapping):
        raise XcclUsageError(
            f"fault {index} of the plan: an object with rank, operation and action, got {attributes!r}"
        )
    names = [field.name for field in dataclasses.fields(Fault)]
    if unknown := set(attributes) - set(names):
        raise XcclUsageError(f"fault {index} of the plan: unknown {sorted(unknown)}; there are {', '.join(names)}")
    if missing := [name for name in names[:3] if name not in attributes]:
        raise XcclUsageError(f"fault {index} of the plan: {', '.join(missing)} is missing")
    try:
        return Fault(**attributes)
    except XcclUsageError as error:
        raise XcclUsageError(f"fault {index} of the plan: {error}") from None


def dump(plan: Plan) -> str:
    """The plan as JSON, for XCCL_FAULTS or a bug report."""
    defaults = {field.name: field.default for field in dataclasses.fields(Fault)}
    return json.dumps(
        [
            {name: value for name, value in dataclasses.asdict(fault).items() if value != defaults[name]}
            for fault in load(plan)
        ]
    )


def random_plan(
    seed: int,
    nranks: int,
    *,
    operations: Sequence[str] = (ANY,),
    actions: Sequence[Action] = ("kill", "stop", "delay", "raise"),
    phases: Sequence[int | Literal["wait"]] = (0, "wait"),
    nth: int = 20,
    ms: float = 100.0,
    count: int = 1,
) -> tuple[Fault, ...]:
    """A plan of `count` faults drawn from these; the same `seed` gives the same plan.

    `nth` and `ms` are upper bounds.
    """
    rng = random.Random(seed)
    return tuple(
        Fault(
            rank=rng.randrange(nranks),
            operation=rng.choice(operations),
            action=rng.choice(actions),
            phase=rng.choice(phases),
            nth=rng.randint(1, nth),
            ms=round(rng.uniform(0.1, 1.0) * ms, 3),
            word=rng.randrange(4),
            bits=1 << rng.randrange(64),
        )
        for _ in range(count)
    )


# ---- in force ----

_lock = threading.Lock()
_in_force: list[tuple[Fault, ...]] = []  # of this process; forked ranks inherit it
_open_worlds: weakref.WeakSet[World] = weakref.WeakSet()


@contextlib.contextmanager
def inject(plan: str | os.PathLike[str] | Plan) -> Iterator[tuple[Fault, ...]]:
    """Puts a plan in force for the block, in place of any other, and gives it as a tuple of Fault.

    It holds for the ranks that this thread has opened, and for all that are started in the block: by `xccl.run`, or
    `xccl.init` in this process. Around `xccl.run` it injects into all ranks; inside a rank only into that one. Programs
    started by `xccl run` need XCCL_FAULTS.

    Raises XcclUsageError for a plan that makes no sense, or would kill or stop a rank that is a thread.
    """
    faults = load(plan)
    with _lock:
        _in_force.append(faults)
    try:
        _apply_here(faults)
        yield faults
    finally:
        with _lock:
            _in_force.remove(faults)
        _apply_here(_current())


def _current() -> tuple[Fault, ...]:
    with _lock:
        if _in_force:
            return _in_force[-1]
    return load(rc.faults) if rc.faults else ()


def _apply_here(faults: tuple[Fault, ...]) -> None:
    for world in list(_open_worlds):
        if world.thread == threading.get_ident():
            _apply(world, faults)


def follow(world: World) -> None:
    """Puts the plan in force into a world whose communicator is open now, and later ones of this thread, too."""
    world.thread = threading.get_ident()
    _open_worlds.add(world)
    if faults := _current():
        _apply(world, faults)


def _apply(world: World, faults: tuple[Fault, ...]) -> None:
    own = [fault for fault in faults if fault.rank == world.rank]
    table = ffi.new("xccl_fault_t[]", max(len(own), 1))
    for entry, fault in zip(table, own, strict=False):
        entry.operation = lib.XCCL_FAULT_ANY_OPERATION if fault.operation == ANY else OPERATIONS.index(fault.operation)
        entry.phase = lib.XCCL_FAULT_WAITS if fault.phase == "wait" else fault.phase
        entry.action = _ACTIONS[fault.action]
        entry.word, entry.bits, entry.nth = fault.word, fault.bits, fault.nth
        entry.ns = int(fault.ms * 1e6)
    check(lib.xccl_fault_inject(world._w, table, len(own)))
