"""Operations whose arguments are checked once and that are then called many times, as MPI's persistent requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xccl._base import CommunicatorBase
from xccl._binding import check

# A call of the C core, ready to be made: the function, its arguments, and what the operation returns. Operations make
# one of these and run it at once. (A plain tuple: a class of its own would double the time of a barrier.)
Call = tuple[Callable[..., int], tuple[Any, ...], Any]


class Prepared:
    """An operation made by `comm.prepare`: calling it runs the operation on the same arrays and returns its result.

    Collective operations stay collective, call for call. The arrays are kept alive; their contents are those at the
    time of each call. Raises what the operation raises; XcclUsageError after the communicator is closed.
    """

    __slots__ = ("_arguments", "_comm", "_function", "_handle", "_kept", "_name", "_read", "_result")

    def __init__(
        self, comm: CommunicatorBase, name: str, call: Call, kept: Any, read: Callable[[Any], Any] | None
    ) -> None:
        self._comm = comm
        self._handle = comm._handle()
        self._name = name
        self._function, self._arguments, self._result = call
        self._kept = kept  # the arrays that the arguments point into
        self._read = read  # makes the result from what the C core wrote, where it differs from call to call

    def __call__(self) -> Any:
        """Runs the operation once."""
        if self._comm._c is not self._handle:
            self._comm._handle()  # raises: closed
        status = self._function(*self._arguments)
        if status < 0:
            check(status)
        return self._result if self._read is None else self._read(self._result)

    def __repr__(self) -> str:
        return f"<xccl.Prepared {self._name} of rank {self._comm.rank}>"
