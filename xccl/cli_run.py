"""`xccl run`: starts a program as the ranks of one world."""

from __future__ import annotations

import argparse
import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import IO, Any

from xccl._binding import check, lib
from xccl._exits import Exits
from xccl._object import SharedObject
from xccl._world import Observer
from xccl.launcher import check_nranks, launch_environment
from xccl.options import options_text, rc

ABORT_SECONDS = 0.5  # for ranks that wait in xccl to end by themselves after the world has ended
TERM_SECONDS = 1.0  # for ranks to end after SIGTERM
IDLE_SECONDS = 0.1  # after which a line that has not ended yet is shown

EXIT_TIMEOUT = 124  # as timeout(1)
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells do


def add_parser(subparsers: Any) -> None:
    """Adds the command to the parser of `xccl`."""
    parser = subparsers.add_parser(
        "run",
        help="start N ranks of a program",
        description="Starts N ranks of a program on this machine. When one fails, all are ended.",
        epilog="Options from the environment:\n" + options_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-n", "--ranks", type=int, required=True, metavar="N", help="number of ranks, also more than cores"
    )
    parser.add_argument("--timeout", type=float, metavar="S", help="end all ranks after S seconds (exit code 124)")
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="a rank that is killed does not end the others, which may go on with comm.shrink()",
    )
    parser.add_argument("--racecheck", action="store_true", help="raise XcclRaceError for races: XCCL_RACECHECK=1")
    parser.add_argument(
        "--chaos", type=int, metavar="SEED", help="perturb waits and puts at random: XCCL_CHAOS=SEED, which is > 0"
    )
    parser.add_argument("--prefix", action="store_true", help='begin each line of output with its rank: "[2] "')
    parser.add_argument("-m", dest="module", action="store_true", help="PROGRAM is a Python module, as in python -m")
    parser.add_argument("program", metavar="PROGRAM", help="a Python file (*.py), or any executable")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the program")
    parser.set_defaults(main=main)


def main(options: argparse.Namespace) -> int:
    """Runs the ranks; returns the exit code: 0, that of the rank that failed first, 124 on timeout, 130 on Ctrl-C."""
    check_nranks(options.ranks)
    if options.racecheck:
        rc.racecheck = "1"
    if options.chaos is not None:
        rc.chaos = options.chaos
    command = [options.program, *options.arguments]
    if options.module:
        command = [sys.executable, "-m", *command]
    elif options.program.endswith(".py"):
        command = [sys.executable, *command]
    job = Job(command, options.ranks, options.prefix, options.keep_going)
    signal.signal(signal.SIGTERM, _raise_exit)
    try:
        job.start()
        code = job.watch(options.timeout)
        if code != 0 and rc.chaos:
            job.say(f"the world was perturbed with XCCL_CHAOS={rc.chaos}")
        return code
    except KeyboardInterrupt:
        job.end("interrupted")
        job.say("interrupted; ended all ranks")
        return EXIT_INTERRUPTED
    finally:
        job.close()


def _raise_exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


class Job:
    """The ranks of one `xccl run`, their output and their end."""

    def __init__(self, command: list[str], size: int, prefix: bool, keep_going: bool = False) -> None:
        self.command = command
        self.size = size
        self.prefix = prefix
        self.keep_going = keep_going
        self.processes: list[subprocess.Popen[bytes]] = []
        self.selector = selectors.DefaultSelector()
        self.pidfds: list[int] = []
        self.shared = SharedObject(size)
        self.observer = Observer(self.shared.fd)
        self.exits = Exits(self.observer)

    def start(self) -> None:
        """Starts all ranks. Rank 0 has this process's standard input, the others none."""
        launcher = os.getpid()
        for rank in range(self.size):
            environment = os.environ | launch_environment(self.shared, rank, self.size)
            process = subprocess.Popen(
                self.command,
                env=environment | {"PYTHONUNBUFFERED": "1"},
                stdin=None if rank == 0 else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(self.shared.fd,),
                # In a session of their own: Ctrl-C comes to the launcher only, which ends them in order.
                start_new_session=True,
                preexec_fn=lambda: check(lib.xccl_shm_die_with_parent(launcher)),
            )
            self.processes.append(process)
            for pipe, output in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                forwarder = Forwarder(pipe, output.buffer, f"[{rank}] ".encode() if self.prefix else b"")
                self.selector.register(forwarder.source, selectors.EVENT_READ, forwarder)
            pidfd = os.pidfd_open(process.pid)
            self.pidfds.append(pidfd)
            self.selector.register(pidfd, selectors.EVENT_READ, rank)

    def watch(self, timeout: float | None) -> int:
        """Forwards output until all ranks have ended; returns the exit code."""
        deadline = None if timeout is None else time.monotonic() + timeout
        unseen = set(range(self.size))  # not running(): a rank may fail between two turns
        while unseen:
            if deadline is not None and time.monotonic() >= deadline:
                return self.fail_timeout(timeout)
            for rank in self.turn(deadline):
                unseen.remove(rank)
                process = self.processes[rank]
                code = self.exits.of_rank(rank, process.pid, process.wait())
                if code < 0 and self.keep_going:
                    self.exits.note(rank, process.pid, code)
                    self.say(f"{self.describe_end(rank, code)}; the others go on")
                elif code != 0:
                    return self.fail(rank, code)
        self.drain()
        return 0

    def running(self) -> list[int]:
        """Ranks that have not ended."""
        return [rank for rank, process in enumerate(self.processes) if process.poll() is None]

    def turn(self, deadline: float | None) -> list[int]:
        """Waits for output or an end, forwards output; returns the ranks that ended."""
        left = IDLE_SECONDS if deadline is None else min(IDLE_SECONDS, max(deadline - time.monotonic(), 0))
        events = self.selector.select(left)
        ended = []
        for key, _ in events:
            if isinstance(key.data, Forwarder):
                if not key.data.forward():
                    self.selector.unregister(key.fileobj)
            else:
                self.selector.unregister(key.fileobj)
                ended.append(key.data)
        if not events and not self.prefix:
            for key in list(self.selector.get_map().values()):
                if isinstance(key.data, Forwarder):
                    key.data.flush()
        return ended

    def drain(self) -> None:
        """Forwards what ended ranks left in their pipes. A child that they left behind may hold a pipe: no waiting."""
        for key in list(self.selector.get_map().values()):
            if isinstance(key.data, Forwarder):
                os.set_blocking(key.data.source.fileno(), False)
                while key.data.forward():
                    pass
                key.data.flush()

    def describe_end(self, rank: int, code: int) -> str:
        """ "rank 2 (pid 123) was killed by SIGKILL in operation 118 (combine), phase 1"."""
        end = f"rank {rank} (pid {self.processes[rank].pid}) {'was ' if code < 0 else ''}{self.exits.describe(code)}"
        return f"{end} in {self.observer.describe(rank)}" if code < 0 else end

    def fail(self, rank: int, code: int) -> int:
        """Ends all because `rank` ended with `code`; says who failed first."""
        end = self.describe_end(rank, code)
        aborted = self.observer.aborted_by()
        self.observer.abort(end)
        self.exits.note(rank, self.processes[rank].pid, code)
        self.end(end)
        if aborted is not None and aborted[0] >= 0:
            # the rank that raised has shown its traceback; ranks that followed it may have ended before it
            rank = aborted[0]
            code = self.processes[rank].poll() or code
            end = self.describe_end(rank, code)
        self.say(f"{end}; ended all ranks")
        return code if code > 0 else 128 - code

    def fail_timeout(self, timeout: float | None) -> int:
        """Ends all because the time is over; says what each rank was doing."""
        states = [f"  rank {r} (pid {self.processes[r].pid}): {self.observer.describe(r)}" for r in self.running()]
        self.end(f"the time limit of {timeout} s passed")
        self.say("\n".join([f"ranks still ran after {timeout} s; ended all ranks", *states]))
        return EXIT_TIMEOUT

    def end(self, reason: str) -> None:
        """Ends all ranks: by the abort flag those that wait in xccl, then by SIGTERM, then by SIGKILL."""
        self.observer.abort(reason)
        self.wait_for(ABORT_SECONDS)
        self.signal(signal.SIGTERM)
        self.wait_for(TERM_SECONDS)
        self.signal(signal.SIGKILL)
        self.wait_for(TERM_SECONDS)
        self.drain()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to all that still run, and to their children: the rank may be behind a shell."""
        for rank in self.running():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.processes[rank].pid, number)

    def wait_for(self, seconds: float) -> None:
        """Forwards output until all have ended, at most `seconds`."""
        deadline = time.monotonic() + seconds
        while self.running() and time.monotonic() < deadline:
            self.turn(deadline)

    def say(self, text: str) -> None:
        """Prints a line of the launcher's own."""
        sys.stderr.write(f"xccl run: {text}\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Ends what still runs and closes all descriptors."""
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        for pidfd in self.pidfds:
            os.close(pidfd)
        self.selector.close()
        self.observer.close()
        self.shared.close()


class Forwarder:
    """Passes a rank's output on, whole lines at a time, each behind `prefix`."""

    def __init__(self, source: IO[bytes] | None, target: IO[bytes], prefix: bytes) -> None:
        if source is None:
            raise TypeError("the rank's output is not a pipe")
        self.source = source
        self.target = target
        self.prefix = prefix
        self.rest = b""

    def forward(self) -> bool:
        """Reads what is there and writes whole lines. False at the end of the output, or if nothing is there."""
        try:
            data = os.read(self.source.fileno(), 1 << 16)
        except BlockingIOError:
            return False
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.target.write(self.prefix + line + b"\n")
        if not data:
            self.flush()
        self.target.flush()
        return bool(data)

    def flush(self) -> None:
        """Writes the begun line."""
        if self.rest:
            self.target.write(self.prefix + self.rest)
            self.target.flush()
            self.rest = b""
