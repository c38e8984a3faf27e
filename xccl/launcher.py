"""Starts ranks and watches over them: `xccl.run(fn, n)` in forked processes, `xccl run` with programs.

Both make the shared object, give each rank its descriptor, and when one rank fails end the others.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from xccl._binding import check, lib
from xccl._exits import Exits
from xccl._object import SharedObject
from xccl._threads import GRACE_SECONDS, run_threads
from xccl._world import Observer
from xccl.cgroup import usable_cores
from xccl.communicator import init
from xccl.errors import XcclAborted, XcclError, XcclPeerLost, XcclTimeout, XcclUsageError


def launch_environment(shared: SharedObject, rank: int, size: int) -> dict[str, str]:
    """The variables by which a rank finds its world."""
    environment = {
        "XCCL_FD": str(shared.fd),
        "XCCL_RANK": str(rank),
        "XCCL_WORLD_SIZE": str(size),
        "XCCL_SESSION": shared.session,
        "XCCL_LAUNCHER_PID": str(os.getpid()),
    }
    # As many BLAS threads as cores in every rank would fight for the cores.
    threads = str(max(1, usable_cores() // size))
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[variable] = os.environ.get(variable, threads)
    return environment


def check_nranks(nranks: int) -> None:
    """Raises XcclUsageError unless `nranks` is a possible size of a world."""
    if not isinstance(nranks, int) or not 1 <= nranks <= lib.XCCL_MAX_RANKS:
        raise XcclUsageError(f"the number of ranks is 1 to {lib.XCCL_MAX_RANKS}, got {nranks!r}")


def run(
    fn: Callable[..., Any],
    nranks: int,
    *args: Any,
    timeout: float | None = None,
    logs: str | Path | None = None,
    keep_going: bool = False,
    host: str = "processes",
) -> list[Any]:
    """Runs `fn(comm, *args)` on `nranks` ranks and returns their results by rank.

    Parameters
    ----------
    fn
        May be a closure: it is not pickled. Its result is.
    timeout : float, optional
        Seconds after which all ranks are ended and XcclTimeout is raised.
    logs : path, optional
        Directory that gets each rank's output as rank-<r>.log; without it ranks write to this process's output.
        Not with threads, which share their output.
    keep_going
        A rank that dies does not end the others, which may go on with `comm.shrink()`. Its place in the result holds
        the XcclPeerLost that is raised otherwise.
    host : "processes" or "threads"
        "processes" are forked from this one. "threads" are threads of this process, for tests: a debugger or a
        sanitizer sees all ranks at once, results need not be pickled, and breakpoints work. Their Python code takes
        turns (calls into xccl run side by side), and a thread cannot be killed: one that does not end within 2 s of
        a failure or of the time limit goes on, and is named in the error.

    Raises
    ------
    XcclAborted
        A rank raised: carries its rank and traceback; the exception itself is the cause when it can be pickled.
    XcclPeerLost
        A rank died without an exception (killed, os._exit).
    XcclTimeout
        The ranks did not finish in `timeout` seconds.
    """
    check_nranks(nranks)
    if host not in ("processes", "threads"):
        raise XcclUsageError(f'xccl.run: host is "processes" or "threads", got {host!r}')
    if host == "threads":
        if logs is not None:
            raise XcclUsageError('xccl.run: logs= needs host="processes": threads share the output of their process')
        return run_threads(fn, nranks, args, timeout)
    shared = SharedObject(nranks)
    observer = Observer(shared.fd)
    exits = Exits(observer)
    context = multiprocessing.get_context("fork")
    sys.stdout.flush()
    sys.stderr.flush()
    ranks: list[_Rank] = []
    try:
        for rank in range(nranks):
            ours, theirs = context.Pipe(duplex=False)
            target = (fn, args, launch_environment(shared, rank, nranks), theirs, ours, logs)
            process = context.Process(target=_rank_main, args=target, name=f"xccl rank {rank}")
            process.start()
            theirs.close()
            ranks.append(_Rank(rank, process, ours))
        deadline = None if timeout is None else time.monotonic() + timeout
        return _collect(ranks, observer, exits, deadline, timeout, keep_going)
    except XcclError as error:
        observer.name_seed(error)
        raise
    finally:
        _end(ranks)
        observer.close()
        shared.close()


class _Rank:
    """A forked rank as its parent sees it."""

    def __init__(self, rank: int, process: Any, results: Connection) -> None:
        self.rank = rank
        self.process = process
        self.results = results
        self.outcome: tuple[bool, Any] | None = None  # (True, result) or (False, _Failure)

    def receive(self) -> None:
        """Takes the outcome that the rank has sent, if it did before it ended."""
        with contextlib.suppress(EOFError, OSError):
            if self.outcome is None and self.results.poll():
                self.outcome = pickle.loads(self.results.recv_bytes())


class _Failure:
    """An exception of a rank: its traceback as text, and itself if it can be pickled."""

    def __init__(self, error: BaseException) -> None:
        self.text = "".join(traceback.format_exception(error))
        self.follows = isinstance(error, XcclAborted)  # raised because another rank failed first
        self.error: BaseException | None = error
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            self.error = None


def _rank_main(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    environment: dict[str, str],
    results: Connection,
    parents_end: Connection,
    logs: str | Path | None,
) -> None:
    parents_end.close()
    check(lib.xccl_shm_die_with_parent(int(environment["XCCL_LAUNCHER_PID"])))
    os.environ.update(environment)
    if logs is not None:
        _redirect_output(Path(logs) / f"rank-{environment['XCCL_RANK']}.log")
    failed = False
    try:
        with init() as comm:
            outcome: tuple[bool, Any] = (True, fn(comm, *args))
            message = pickle.dumps(outcome)
    except BaseException as error:
        failed = True
        if "comm" in locals():
            comm._world.name_seed(error)
        failure = _Failure(error)
        if "comm" in locals():
            comm.abort(failure.text)
        message = pickle.dumps((False, failure))
        if logs is not None:
            sys.stderr.write(failure.text)
    results.send_bytes(message)
    results.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # The parent's exit handlers and buffers are not this rank's.
    os._exit(1 if failed else 0)


def _redirect_output(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _collect(
    ranks: list[_Rank],
    observer: Observer,
    exits: Exits,
    deadline: float | None,
    timeout: float | None,
    keep_going: bool,
) -> list[Any]:
    """Waits for all outcomes; raises for the rank that failed first."""
    for _ in _arrivals(ranks, deadline):
        died = [r for r in ranks if r.outcome is None and not r.process.is_alive()]
        for rank in died:
            rank.receive()
            if rank.outcome is None:
                lost = _loss(rank, observer, exits, keep_going)
                if not keep_going:
                    raise lost
                rank.outcome = (True, lost)
        failed = [r for r in ranks if r.outcome is not None and not r.outcome[0]]
        if failed:
            _await_end(ranks)
            _raise_failure([r for r in ranks if r.outcome is not None and not r.outcome[0]])
    missing = [r for r in ranks if r.outcome is None]
    if missing:
        states = "\n".join(f"  rank {r.rank} (pid {r.process.pid}): {observer.describe(r.rank)}" for r in missing)
        raise XcclTimeout(f"xccl.run: {len(missing)} of {len(ranks)} ranks did not finish in {timeout} s:\n{states}")
    return [r.outcome[1] for r in ranks if r.outcome is not None]


def _arrivals(ranks: list[_Rank], deadline: float | None) -> Iterator[None]:
    """Yields whenever a rank sent its outcome or ended, until all have or the deadline passed."""
    while pending := [r for r in ranks if r.outcome is None]:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return
        if not wait([r.results for r in pending] + [r.process.sentinel for r in pending], left):
            return
        for rank in pending:
            rank.receive()
        yield


def _loss(rank: _Rank, observer: Observer, exits: Exits, keep_going: bool) -> XcclPeerLost:
    """What became of a rank that ended without an outcome; tells the others."""
    rank.process.join()
    pid, code = rank.process.pid, rank.process.exitcode
    cause = exits.describe(code)
    lost = f"rank {rank.rank} (pid {pid}) {'was ' if code < 0 else ''}{cause} in {observer.describe(rank.rank)}"
    if not keep_going:
        observer.abort(lost)
    exits.note(rank.rank, pid, code)
    ending = "" if keep_going else "; the other ranks were ended"
    return XcclPeerLost(f"xccl.run: {lost}{ending}", rank.rank, pid, cause)


def _raise_failure(failed: list[_Rank]) -> None:
    """Raises for the rank whose failure was not caused by another rank's."""
    failures = [(r.rank, r.outcome[1]) for r in failed if r.outcome is not None]
    rank, failure = next(((r, f) for r, f in failures if not f.follows), failures[0])
    error = XcclAborted(f"xccl.run: rank {rank} raised:\n{failure.text}", rank, failure.text)
    raise error from failure.error


def _await_end(ranks: list[_Rank]) -> None:
    """Gives ranks that the abort woke the time to report and end."""
    deadline = time.monotonic() + GRACE_SECONDS
    for rank in ranks:
        while rank.outcome is None and rank.process.is_alive() and time.monotonic() < deadline:
            wait([rank.results, rank.process.sentinel], deadline - time.monotonic())
            rank.receive()


def _end(ranks: list[_Rank]) -> None:
    """Ends what still runs, and reaps all."""
    for rank in ranks:
        if rank.outcome is not None:
            rank.process.join(GRACE_SECONDS)
        if rank.process.is_alive():
            rank.process.kill()
    for rank in ranks:
        rank.process.join()
        rank.results.close()
        rank.process.close()
