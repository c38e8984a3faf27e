"""What xccl raises."""

from __future__ import annotations


class XcclError(Exception):
    """Base of all errors of xccl."""


class XcclUsageError(XcclError, ValueError):
    """An argument, or the order of calls, is wrong. Nothing was changed unless the message says so."""


class XcclTimeout(XcclError, TimeoutError):
    """The deadline passed. The message names each awaited slot and the state of every rank."""


class XcclPeerLost(XcclError):
    """A rank that is waited for is dead or has left the world."""


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


class XcclOutOfMemory(XcclError, MemoryError):
    """Shared memory or address space is used up. The message tells needed, free, and what to change."""


class XcclSystemError(XcclError, OSError):
    """A system call failed."""
