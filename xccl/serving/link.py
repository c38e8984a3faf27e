"""Messages between a server's front and its ranks, over one socket a rank; neither side ever waits for the other."""

from __future__ import annotations

import pickle
import select
import socket
import struct
from dataclasses import dataclass
from typing import Any

from xccl.serving.request import FinishReason, Request

_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class Submit:
    """To one rank: serve this request. ``submitted`` counts the requests sent to all ranks so far, this included."""

    request: Request
    submitted: int


@dataclass(frozen=True)
class Wake:
    """To a rank that does not get the request: others need its experts. ``submitted`` as in Submit."""

    submitted: int


@dataclass(frozen=True)
class Cancel:
    """To the rank that has the request: nobody wants the rest of its text."""

    request_id: int


Command = Submit | Wake | Cancel


@dataclass(frozen=True)
class RankInfo:
    """A rank says once that it is ready, and what it is.

    ``roles`` are what the rank does, in words for people. A rank with ``slots`` 0 is given no requests.
    """

    rank: int
    pid: int
    roles: tuple[str, ...]
    slots: int
    kv_blocks: int
    local_experts: tuple[int, ...]


@dataclass(frozen=True)
class Tokens:
    """New tokens of a rank's requests, in order of generation, and the requests that ended."""

    request_ids: list[int]
    tokens: list[int]
    ended: list[tuple[int, FinishReason]]


@dataclass(frozen=True)
class RankStatus:
    """How a rank is doing: totals since the start, and how full it is now.

    ``bytes_to`` and ``bytes_from`` [ranks] are rows of this rank's tokens that went to each rank's experts, and
    their outputs that came back. ``expert_load`` [layers][experts] counts this rank's tokens.
    """

    steps: int
    waiting: int
    running: int
    kv_blocks: int
    bytes_to: list[int]
    bytes_from: list[int]
    expert_load: list[list[int]]
    drafted: int
    accepted: int


News = RankInfo | Tokens | RankStatus


class Link:
    """One end of a connected stream socket that carries messages. Not for several threads.

    What the other side does not take yet is kept here and goes out with a later :meth:`flush`.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._incoming = bytearray()
        self._outgoing = bytearray()

    @property
    def has_backlog(self) -> bool:
        """Whether :meth:`flush` has something to send."""
        return bool(self._outgoing)

    def fileno(self) -> int:
        """The descriptor, for an event loop."""
        return self._socket.fileno()

    def send(self, message: Any) -> None:
        """Send a message, or keep it until the other side has room. Never waits."""
        payload = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        self._outgoing += _LENGTH.pack(len(payload)) + payload
        self.flush()

    def flush(self) -> None:
        """Send what was kept, as far as the other side has room. A closed other side is told by :meth:`receive`."""
        try:
            while self._outgoing:
                del self._outgoing[: self._socket.send(self._outgoing)]
        except BlockingIOError:
            return
        except OSError:
            self._outgoing.clear()

    def receive(self) -> list[Any]:
        """All messages that are here now. Raises EOFError if there are none and the other side has closed."""
        closed = self._read()
        messages = []
        while len(self._incoming) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._incoming)[0]
            if len(self._incoming) < end:
                break
            messages.append(pickle.loads(memoryview(self._incoming)[_LENGTH.size : end]))
            del self._incoming[:end]
        if closed and not messages:
            raise EOFError("the other side has closed")
        return messages

    def wait(self) -> None:
        """Sleep until there is something to receive; meanwhile what was kept goes out."""
        while True:
            readable, writable, _ = select.select([self], [self] if self._outgoing else [], [])
            if writable:
                self.flush()
            if readable:
                return

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _read(self) -> bool:
        """Read what is there; True if the other side has closed."""
        try:
            while data := self._socket.recv(_READ_BYTES):
                self._incoming += data
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True
