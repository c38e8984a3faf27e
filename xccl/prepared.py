"""Operations whose arguments are checked once and that are then called many times, as MPI's persistent requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from xccl._base import CommunicatorBase
from xccl._binding import check


class Call(NamedTuple):
    """One call of the C core, ready to be made: every operation of a communicator makes one of these and runs it."""

    function: Callable[..., int]
    arguments: tuple[Any, ...]
    result: Any = None  # what the operation returns
    kept: tuple[Any, ...] = ()  # arrays that the arguments point into
    read_result: Callable[[], Any] | None = None  # makes the result after the call, where it differs from call to call

    def run(self) -> Any:
        """Makes the call; returns the operation's result or raises."""
        check(self.function(*self.arguments))
        return self.result if self.read_result is None else self.read_result()


class Prepared:
    """An operation made by `comm.prepare`: calling it runs the operation on the same arrays and returns its result.

    Collective operations stay collective, call for call. The arrays are kept alive; their contents are those at the
    time of each call. Raises what the operation raises; XcclUsageError after the communicator is closed.
    """

    __slots__ = ("_arguments", "_call", "_comm", "_function", "_handle", "_name", "_read_result", "_result")

    def __init__(self, comm: CommunicatorBase, name: str, call: Call) -> None:
        self._comm = comm
        self._handle = comm._handle()
        self._name = name
        self._call = call
        self._function, self._arguments, self._result = call.function, call.arguments, call.result
        self._read_result = call.read_result

    def __call__(self) -> Any:
        """Runs the operation once."""
        if self._comm._c is not self._handle:
            self._comm._handle()  # raises: closed
        status = self._function(*self._arguments)
        if status < 0:
            check(status)
        return self._result if self._read_result is None else self._read_result()

    def __repr__(self) -> str:
        return f"<xccl.Prepared {self._name} of rank {self._comm.rank}>"
