"""Sessions as seen from outside: which there are, and what their ranks do, without their help and also when they hang.

A rank keeps the shared object open, so it is found among the open files of this user's processes, or by its name in
XCCL_SHM_DIR. Only its control page is read, and nothing is written: no right to trace is needed.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xccl._binding import RANK_STATES, check, ffi, lib
from xccl._object import PREFIX, shm_directory
from xccl.errors import XcclError


@dataclass(frozen=True)
class RankState:
    """What one rank was doing at one look.

    Attributes
    ----------
    state : str
        "absent" (not started yet), "alive", "stopped" (SIGSTOP, debugger), "dead", or "left" (ended in order).
    pid : int
        In the rank's own PID namespace.
    operation, sequence, phase : str, int, int
        The current or last operation, how many have begun, and the step inside it.
    waits_for : int or None
        Rank that it waits for first. None: it does not sleep in xccl, or waits for whoever signals.
    moved_s : float
        Seconds since its last operation began.
    """

    rank: int
    state: str
    pid: int
    operation: str
    sequence: int
    phase: int
    waits_for: int | None
    moved_s: float


@dataclass(frozen=True)
class Session:
    """One look at a world.

    Attributes
    ----------
    creator_pid : int
        The launcher, or rank 0 under mpirun and torchrun.
    age_s : float
        Seconds since it was made.
    aborted : bool
        A rank or the launcher has ended it.
    taken : float
        When the look was taken, on the clock of time.monotonic().
    """

    session: str
    size: int
    creator_pid: int
    age_s: float
    aborted: bool
    taken: float
    ranks: list[RankState]


def look(prefix: str = "") -> list[Session]:
    """A look at every session of this user whose id begins with `prefix`, the oldest first."""
    sessions = []
    for fd in _open_objects():
        try:
            session = _read(fd)
        except XcclError:
            continue  # of another version of xccl, or half made
        finally:
            os.close(fd)
        if session.session.startswith(prefix):
            sessions.append(session)
    return sorted(sessions, key=lambda session: -session.age_s)


def rates(before: Session, after: Session) -> list[float]:
    """Operations per second of each rank between two looks."""
    elapsed = max(after.taken - before.taken, 1e-9)
    return [(b.sequence - a.sequence) / elapsed for a, b in zip(before.ranks, after.ranks, strict=True)]


def held_up_by(session: Session) -> dict[int, int]:
    """Who holds up how many: ranks that others wait for, directly or through others, and that wait for nobody.

    If ranks wait for each other in a circle, all of the circle are named.
    """
    waits = {r.rank: r.waits_for for r in session.ranks if r.waits_for is not None and r.state in ("alive", "stopped")}
    blame: dict[int, int] = {}
    for start in waits:
        for culprit in _end_of_chain(start, waits):
            if culprit != start:
                blame[culprit] = blame.get(culprit, 0) + 1
    return blame


def _end_of_chain(start: int, waits: dict[int, int]) -> list[int]:
    seen: list[int] = []
    rank = start
    while rank in waits and rank not in seen:
        seen.append(rank)
        rank = waits[rank]
    return seen[seen.index(rank) :] if rank in seen else [rank]


def _read(fd: int) -> Session:
    out = ffi.new("xccl_world_t **")
    check(lib.xccl_shm_observe(fd, out))
    try:
        info = ffi.new("xccl_session_info_t *")
        lib.xccl_shm_session_info(out[0], info)
        now = time.monotonic()
        return Session(
            session=ffi.string(info.session).decode(),
            size=int(info.size),
            creator_pid=int(info.creator_pid),
            age_s=max(now - info.created_ns * 1e-9, 0.0),
            aborted=bool(info.aborted),
            taken=now,
            ranks=[_read_rank(out[0], rank, now) for rank in range(info.size)],
        )
    finally:
        lib.xccl_shm_unmap(out[0])


def _read_rank(world: object, rank: int, now: float) -> RankState:
    info = ffi.new("xccl_rank_info_t *")
    check(lib.xccl_shm_rank_info(world, rank, info))
    here = info.state != lib.XCCL_RANK_ABSENT
    return RankState(
        rank=rank,
        state=RANK_STATES[info.state],
        pid=int(info.pid),
        operation=ffi.string(info.operation).decode(),
        sequence=int(info.sequence),
        phase=int(info.phase),
        waits_for=int(info.waits_for) if here and info.waits_for >= 0 else None,
        moved_s=max(now - info.moved_ns * 1e-9, 0.0) if info.moved_ns else 0.0,
    )


def _open_objects() -> Iterator[int]:
    """Each shared object once, open for reading."""
    seen: set[tuple[int, int]] = set()
    for path in _candidates():
        with contextlib.suppress(OSError):
            found = os.stat(path)
            ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_size > 0
            if not ours or (found.st_dev, found.st_ino) in seen:
                continue
            seen.add((found.st_dev, found.st_ino))
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if lib.xccl_shm_is_held(fd) < 0:
                os.close(fd)
                continue
            yield fd


def _candidates() -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from shm_directory().glob(f"{PREFIX}*")
    own = os.geteuid()
    for process in Path("/proc").iterdir():
        # Gone meanwhile, or not to be read: of another user, or made so by the process itself.
        with contextlib.suppress(OSError):
            if process.name.isdigit() and process.stat().st_uid == own:
                yield from (process / "fd").iterdir()
