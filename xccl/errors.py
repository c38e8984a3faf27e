"""What xccl raises."""

from __future__ import annotations

from dataclasses import dataclass


class XcclError(Exception):
    """Base of all errors of xccl."""


class XcclUsageError(XcclError, ValueError):
    """An argument, or the order of calls, is wrong. Nothing was changed unless the message says so."""


@dataclass(frozen=True)
class Missing:
    """One thing that a call still waited for when its deadline passed.

    Attributes
    ----------
    rank
        World rank that was to bring it; -1 if any rank may (a user's signal). The attributes after `seen` are that
        rank's, at that time.
    what, expected, seen
        The slot, and its value in its own unit: an epoch, a count, a signal's value.
    state
        "alive", "stopped" (SIGSTOP, a debugger), "dead", "left" or "absent" (not yet started).
    operation, sequence, phase
        What the rank does, the number of operations that it has begun, and its step in this one.
    idle
        Seconds since it last began an operation or step.
    """

    rank: int
    what: str
    expected: int
    seen: int
    state: str = ""
    operation: str = ""
    sequence: int = 0
    phase: int = 0
    idle: float = 0.0


class XcclTimeout(XcclError, TimeoutError):
    """The deadline passed. The message names each awaited slot and the state of every rank.

    Attributes
    ----------
    missing : tuple of Missing
        What the call still waited for, at most 16 things; empty if a whole launch timed out.
    """

    def __init__(self, message: str, missing: tuple[Missing, ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing

    def __reduce__(self) -> tuple[type[XcclTimeout], tuple[str, tuple[Missing, ...]]]:
        return XcclTimeout, (str(self), self.missing)


class XcclPeerLost(XcclError):
    """A rank that is waited for is dead or has left the world.

    Attributes
    ----------
    rank : int
        World rank that is lost; -1 if it is not a single one.
    pid : int
        Its process, in its own PID namespace; 0 if it never started.
    cause : str
        How the process ended: "killed by SIGKILL", "exited with code 3", "killed, out of memory". Empty if nobody
        knows: the rank left in order, or whatever started it (mpirun, torchrun) does not tell.
    """

    def __init__(self, message: str, rank: int = -1, pid: int = 0, cause: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.pid = pid
        self.cause = cause

    def __reduce__(self) -> tuple[type[XcclPeerLost], tuple[str, int, int, str]]:
        return XcclPeerLost, (str(self), self.rank, self.pid, self.cause)


class XcclAborted(XcclError):
    """A rank raised an exception, which ended the world.

    Attributes
    ----------
    rank : int
        The rank that raised; -1 if the launcher ended the world.
    traceback_text : str
        The traceback (or message) of that rank.
    """

    def __init__(self, message: str, rank: int = -1, traceback_text: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.traceback_text = traceback_text

    def __reduce__(self) -> tuple[type[XcclAborted], tuple[str, int, str]]:
        return XcclAborted, (str(self), self.rank, self.traceback_text)


class XcclMissingExperts(XcclError):
    """Tokens chose experts that have no live rank, and combine was not told to go on without them (`on_missing`).

    The message names the first token, its missing experts and their ranks. Raised when the combine is complete: the
    peers have what they wait for, the handle is used, the group works, `out=` holds the sums without those experts.

    Attributes
    ----------
    tokens : tuple of int
        All tokens of this rank that miss an expert.
    """

    def __init__(self, message: str, tokens: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.tokens = tokens

    def __reduce__(self) -> tuple[type[XcclMissingExperts], tuple[str, tuple[int, ...]]]:
        return XcclMissingExperts, (str(self), self.tokens)


class XcclRaceError(XcclError):
    """Two ranks access the same bytes, one of them writes, and nothing orders the two (see `racecheck` in the options).

    The message names both sides: array, bytes, rank, operation and line; and what would order them.
    """


class XcclInjected(XcclError):
    """A fault that was injected on purpose (see `xccl.faults`): the message names operation and fault."""


class XcclOutOfMemory(XcclError, MemoryError):
    """Shared memory or address space is used up. The message tells needed, free, and what to change."""


class XcclSystemError(XcclError, OSError):
    """A system call failed."""
