"""Ranks as threads of this process: what `xccl.run(..., host="threads")` does.

They share one mapping of the object and nothing else: each has its own attachment, communicator and error messages,
and calls into the C core without the interpreter lock, so ranks that wait do not hinder those that compute in C.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from xccl._binding import ffi, lib
from xccl._object import SharedObject
from xccl._world import Observer, World
from xccl.communicator import Communicator, open_communicator
from xccl.errors import XcclAborted, XcclTimeout

GRACE_SECONDS = 2.0  # for ranks to end by themselves once the world has ended


@dataclass
class _Outcome:
    rank: int
    result: Any = None
    error: BaseException | None = None


def run_threads(fn: Callable[..., Any], nranks: int, args: tuple[Any, ...], timeout: float | None) -> list[Any]:
    """Runs `fn(comm, *args)` on `nranks` threads of this process; see `xccl.run`."""
    shared = SharedObject(nranks)
    observer = Observer(shared.fd)
    try:
        ranks = _Ranks(fn, args, _attach(shared, nranks))
        try:
            return ranks.collect(observer, timeout)
        except BaseException as error:  # Ctrl-C, too: nobody may be left in a call
            observer.name_seed(error)
            observer.abort("".join(traceback.format_exception(error)))
            ranks.join()
            raise
    finally:
        observer.close()
        shared.close()


def _attach(shared: SharedObject, nranks: int) -> list[World]:
    first = World(shared.fd, 0, nranks, shared.session)
    # Signal handlers run in the main thread, where no rank is.
    lib.xccl_shm_set_interrupt(first._w, ffi.NULL)
    return [first, *(first.beside(rank) for rank in range(1, nranks))]


class _Ranks:
    """The threads, and what has come of them."""

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], worlds: list[World]) -> None:
        self._fn, self._args = fn, args
        self._finished: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        self._outcomes: dict[int, _Outcome] = {}
        self._threads = [
            # daemons: one that never ends must not keep the process
            threading.Thread(target=self._main, args=(world,), name=f"xccl rank {world.rank}", daemon=True)
            for world in worlds
        ]
        for thread in self._threads:
            thread.start()

    def _main(self, world: World) -> None:
        outcome = _Outcome(world.rank)
        try:
            with _open(world) as comm:
                outcome.result = self._fn(comm, *self._args)
        except BaseException as error:
            outcome.error = error
            world.name_seed(error)
            world.abort("".join(traceback.format_exception(error)))
        self._finished.put(outcome)

    def _receive(self, seconds: float | None) -> bool:
        """Takes one more outcome; False if none came in time."""
        try:
            outcome = self._finished.get(timeout=seconds)
        except queue.Empty:
            return False
        self._outcomes[outcome.rank] = outcome
        return True

    def join(self) -> None:
        """Gives ranks that the abort woke the time to end."""
        deadline = time.monotonic() + GRACE_SECONDS
        while len(self._outcomes) < len(self._threads):
            if not self._receive(max(deadline - time.monotonic(), 0)):
                return
        for thread in self._threads:
            thread.join(GRACE_SECONDS)

    def collect(self, observer: Observer, timeout: float | None) -> list[Any]:
        """Waits for all outcomes; raises for the rank that failed first."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while len(self._outcomes) < len(self._threads):
            if not self._receive(None if deadline is None else max(deadline - time.monotonic(), 0)):
                self._raise_timeout(observer, timeout)
            if any(outcome.error for outcome in self._outcomes.values()):
                self.join()
                self._raise_failure()
        self.join()
        return [self._outcomes[rank].result for rank in range(len(self._threads))]

    def _raise_timeout(self, observer: Observer, timeout: float | None) -> None:
        missing = [rank for rank in range(len(self._threads)) if rank not in self._outcomes]
        states = "".join(f"\n  rank {rank}: {observer.describe(rank)}" for rank in missing)
        what = f"xccl.run: {len(missing)} of {len(self._threads)} ranks did not finish in {timeout} s:{states}"
        observer.abort(what)
        self.join()
        raise XcclTimeout(what + self._describe_running())

    def _raise_failure(self) -> None:
        failed = [(rank, outcome.error) for rank, outcome in self._outcomes.items() if outcome.error is not None]
        rank, error = next((pair for pair in failed if not isinstance(pair[1], XcclAborted)), failed[0])
        text = "".join(traceback.format_exception(error))
        message = f"xccl.run: rank {rank} raised:\n{text}{self._describe_running()}"
        raise XcclAborted(message, rank, text) from error

    def _describe_running(self) -> str:
        """Names the ranks that have not ended and where they are: a thread cannot be killed."""
        frames = sys._current_frames()
        lines = []
        for rank, thread in enumerate(self._threads):
            if rank in self._outcomes or thread.ident not in frames:
                continue
            where = traceback.extract_stack(frames[thread.ident], limit=None)[-1]
            lines.append(f"\n  rank {rank} still runs, in {where.name} at {where.filename}:{where.lineno}")
        if not lines:
            return ""
        return (
            f"\n{len(lines)} threads did not end within {GRACE_SECONDS} s of the world's end, and threads cannot be "
            f'killed (ranks that compute for long or block elsewhere need host="processes"):{"".join(lines)}'
        )


def _open(world: World) -> Communicator:
    world.wait_all_attached()
    return open_communicator(world)
