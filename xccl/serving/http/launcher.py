"""Starts a server's processes, the front and the ranks, and ends them all together."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

import xccl
from xccl._exits import describe_exit
from xccl.errors import XcclError
from xccl.serving.http.front import FrontSettings, front_main
from xccl.serving.link import Link
from xccl.serving.online import serve_online
from xccl.serving.report import counted
from xccl.serving.service import ServiceOptions

_BACKLOG = 1024
_FRONT_SECONDS = 1.6  # for the front to tell its clients and end, while no rank runs any more


class Stopped(BaseException):
    """A signal asks the server to end; not an error."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def serve_http(
    listener: socket.socket, num_ranks: int, options: ServiceOptions, settings: FrontSettings, timeout: float | None
) -> int:
    """Serve until a signal ends it; returns the exit code. Closes ``listener``.

    Raises XcclError when a rank or the front fails; clients that wait are told first.
    """
    pairs = [socket.socketpair() for _ in range(num_ranks)]
    fronts_ends = [front for front, _ in pairs]
    ranks_ends = [rank for _, rank in pairs]
    front: _Front | None = None
    with _signals():
        try:
            front = _Front(settings, listener, fronts_ends, ranks_ends)
            xccl.run(_rank_main, num_ranks, options, ranks_ends, front, timeout=timeout)
            raise XcclError("xccl serve: the ranks ended by themselves")
        except Stopped as stop:
            unfinished = 0 if front is None else front.end(f"stopped by {stop}")
            told = f", {counted(unfinished, 'unfinished request')} told" if unfinished else ""
            sys.stderr.write(f"xccl serve: stopped by {stop}{told}\n")
            return 128 + stop.number
        except XcclError as error:
            _ignore_signals()
            if front is None:
                raise
            if (code := front.exit_code()) is not None:
                raise XcclError(
                    f"xccl serve: the HTTP process (pid {front.pid}) ended: {describe_exit(code)}"
                ) from error
            front.end(str(error).splitlines()[0])
            raise
        finally:
            if front is not None:
                front.kill()
            for end in ranks_ends:
                end.close()


class _Front:
    """The front's process as its launcher sees it."""

    def __init__(
        self,
        settings: FrontSettings,
        listener: socket.socket,
        fronts_ends: Sequence[socket.socket],
        ranks_ends: Sequence[socket.socket],
    ) -> None:
        context = multiprocessing.get_context("fork")
        self.orders, theirs = context.Pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        arguments = (os.getpid(), settings, listener, fronts_ends, theirs, [*ranks_ends, self.orders])
        self._process = context.Process(target=_front_main, args=arguments, name="xccl front")
        self._process.start()
        theirs.close()
        # what is open here would be open in every rank, and nobody could see the other side close
        listener.close()
        for end in fronts_ends:
            end.close()

    @property
    def pid(self) -> int | None:
        """Its process id."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """Its exit code if it has ended."""
        self._process.join(0)
        return self._process.exitcode

    def end(self, reason: str) -> int:
        """Have it tell its clients and end; returns how many requests were unfinished."""
        unfinished = 0
        deadline = time.monotonic() + _FRONT_SECONDS
        with contextlib.suppress(OSError, EOFError):
            self.orders.send(reason)
            if self.orders.poll(_FRONT_SECONDS):
                unfinished = int(self.orders.recv())
        self._process.join(max(deadline - time.monotonic(), 0))
        return unfinished

    def kill(self) -> None:
        """End it if it has not ended by itself."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._process.close()
        self.orders.close()


def _front_main(
    launcher: int,
    settings: FrontSettings,
    listener: socket.socket,
    ends: Sequence[socket.socket],
    orders: Connection,
    others: Sequence[Any],
) -> None:
    for end in others:
        end.close()
    front_main(launcher, settings, listener, ends, orders)


def _rank_main(comm: xccl.Communicator, options: ServiceOptions, ends: Sequence[socket.socket], front: _Front) -> None:
    front.orders.close()
    for rank, end in enumerate(ends):
        if rank != comm.rank:
            end.close()
    serve_online(comm, options, Link(ends[comm.rank]))


def _ignore_signals() -> None:
    """From here on the server ends, and nothing may interrupt that."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise Stopped, once; more of them change nothing."""

    def stop(number: int, frame: FrameType | None) -> None:
        _ignore_signals()
        raise Stopped(number)

    previous = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
