"""What all parts of a communicator share."""

from __future__ import annotations

from typing import Any

from xccl._binding import Call, entry
from xccl._world import World
from xccl.errors import XcclUsageError


class CommunicatorBase:
    """A communicator's handle, rank and size; the parts of its API are mixins over this."""

    _c: Any  # xccl_comm_t *, None after close
    _entry: Any  # the handle of fast calls, entry.Comm; declines all calls after close
    _world: World
    rank: int
    size: int

    def _handle(self) -> Any:
        """The C handle; raises XcclUsageError after close."""
        if self._c is None:
            raise XcclUsageError(f"rank {self.rank}: this communicator is closed")
        return self._c

    def _run(self, call: Call) -> Any:
        """Makes a call whose arguments have been checked, and returns what the operation gives."""
        code, arguments, result = call
        self._handle()
        return entry.run(self._entry, code, arguments, result)
