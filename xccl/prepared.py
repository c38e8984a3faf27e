"""Operations whose arguments are checked once and that are then called many times, as MPI's persistent requests."""

from __future__ import annotations

from typing import Any

from xccl._base import CommunicatorBase
from xccl._binding import Call, entry


class Prepared(entry.Prepared):  # type: ignore[misc]
    """An operation made by `comm.prepare`: calling it runs the operation on the same arrays and returns its result.

    Collective operations stay collective, call for call. The arrays are kept alive; their contents are those at the
    time of each call. Raises what the operation raises; XcclUsageError after the communicator is closed.
    """

    __slots__ = ("_name", "_rank")

    def __new__(cls, comm: CommunicatorBase, name: str, call: Call, kept: Any) -> Prepared:
        """Made by `comm.prepare`: `kept` is what the call points into."""
        code, arguments, result = call
        made: Prepared = super().__new__(cls, comm._entry, code, arguments, result, kept, comm._handle)
        made._name, made._rank = name, comm.rank
        return made

    def __repr__(self) -> str:
        return f"<xccl.Prepared {self._name} of rank {self._rank}>"
