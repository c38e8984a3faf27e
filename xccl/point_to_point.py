"""Send and receive between two ranks (the protocol of the xDeepServe paper, section 3.1)."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import numpy as np

from xccl._base import CommunicatorBase
from xccl._binding import (
    Call,
    address_to_read,
    address_to_write,
    check,
    entry,
    ffi,
    integer,
    lib,
    readable,
    timeout_ns,
    writable,
)
from xccl.errors import XcclUsageError
from xccl.request import Message, Request

Array = np.ndarray[Any, Any]
SendMode = Literal["default", "sync"]

ANY_SOURCE: int = lib.XCCL_ANY_SOURCE
ANY_TAG: int = lib.XCCL_ANY_TAG

_MODES = {"default": lib.XCCL_SEND_DEFAULT, "sync": lib.XCCL_SEND_SYNC}


def _read_message(out: Any) -> Message:
    """What the C core wrote of a received message."""
    return Message(out.source, out.tag, out.bytes)


class PointToPoint(CommunicatorBase):
    """Send and receive.

    Messages are bytes: the arrays of sender and receiver need the same number of bytes, not the same dtype or shape.
    A receive takes the oldest message of its source and tag. Arrays must be C-contiguous; nothing is copied
    silently. Progress is made whenever this rank waits in any operation of any communicator.
    """

    @cached_property
    def _message(self) -> Any:
        """Where the C core tells about the message of a blocking call."""
        return ffi.new("xccl_message_t *")

    @cached_property
    def _dropped(self) -> list[tuple[Any, Any]]:
        """Requests that the program dropped while they were pending, with their arrays."""
        return []

    @cached_property
    def _lost(self) -> list[str]:
        """Why dropped requests failed, until close tells."""
        return []

    def send(
        self, buf: Array, dest: int, tag: int = 0, *, mode: SendMode = "default", timeout: float | None = None
    ) -> None:
        """Sends the bytes of `buf` to rank `dest`; returns when `buf` may be used again.

        Small messages return at once while the ring to `dest` has room. Large ones, and those from large symmetric
        arrays (p2p_slot_size or more: the receiver copies straight from there), return only when `dest` receives
        them; so two ranks that send to each other before they receive should use isend. To the own rank it always
        returns at once.

        Parameters
        ----------
        tag : int
            Any number from 0 to 2**63 - 1 (the paper's event id).
        mode : "default" or "sync"
            "sync" returns when the receiver has acknowledged the message.

        Raises
        ------
        XcclTimeout, XcclPeerLost, XcclAborted
            The message is withdrawn, except in mode "sync" when it has already arrived and only waits to be
            received. `buf` may be used again and the communicator stays usable.
        """
        if entry.send(self._entry, buf, dest, tag, mode, timeout) is None:
            self._run(self._send(buf, dest, tag, mode=mode, timeout=timeout))

    def _send(
        self, buf: Array, dest: int, tag: int = 0, *, mode: SendMode = "default", timeout: float | None = None
    ) -> Call:
        address = address_to_read(buf, "buf", "send")
        to, event = integer(dest, "dest", "send"), integer(tag, "tag", "send", bits=64)
        return entry.SEND, (address, buf.nbytes, to, event, _mode(mode, "send"), timeout_ns(timeout)), None

    def recv(self, buf: Array, source: int, tag: int = 0, *, timeout: float | None = None) -> Message:
        """Receives a message of exactly `buf.nbytes` bytes into `buf`; returns its source, tag and nbytes.

        `source` may be ANY_SOURCE (the sources take turns) and `tag` ANY_TAG.

        Raises
        ------
        XcclUsageError
            The message has another size (source, tag, got and expected are named). It stays queued; `probe` tells
            its size beforehand.
        XcclTimeout, XcclPeerLost, XcclAborted
            Nothing was consumed; part of `buf` may have been written.
        """
        message: Message | None = entry.recv(self._entry, buf, source, tag, timeout)
        return self._run(self._recv(buf, source, tag, timeout=timeout)) if message is None else message

    def _recv(self, buf: Array, source: int, tag: int = 0, *, timeout: float | None = None) -> Call:
        address = address_to_write(buf, "buf", "recv")
        origin, event = integer(source, "source", "recv"), integer(tag, "tag", "recv", bits=64)
        return entry.RECV, (address, buf.nbytes, origin, event, timeout_ns(timeout)), None

    def isend(self, buf: Array, dest: int, tag: int = 0, *, mode: SendMode = "default") -> Request:
        """Starts a send and returns its Request. Leave `buf` alone until that is complete.

        Messages to one rank leave in the order of the sends, blocking or not. Never blocks.
        """
        address = readable(buf, "buf", "isend")
        self._reap()
        out = ffi.new("xccl_request_t **")
        check(
            lib.xccl_p2p_isend(
                self._handle(),
                address,
                buf.nbytes,
                integer(dest, "dest", "isend"),
                integer(tag, "tag", "isend", bits=64),
                _mode(mode, "isend"),
                out,
            )
        )
        return Request(self, out[0], buf)

    def irecv(self, buf: Array, source: int, tag: int = 0) -> Request:
        """Starts a receive and returns its Request, whose wait and test return source, tag and nbytes.

        Receives match messages in the order in which they were posted. Arguments and errors as for `recv`.
        """
        address = writable(buf, "buf", "irecv")
        self._reap()
        out = ffi.new("xccl_request_t **")
        check(
            lib.xccl_p2p_irecv(
                self._handle(),
                address,
                buf.nbytes,
                integer(source, "source", "irecv"),
                integer(tag, "tag", "irecv", bits=64),
                out,
            )
        )
        return Request(self, out[0], buf)

    def probe(self, source: int = ANY_SOURCE, tag: int = ANY_TAG, *, timeout: float | None = None) -> Message:
        """Waits for a message that `recv(buf, source, tag)` would take; returns its source, tag and nbytes."""
        out = self._message
        check(
            lib.xccl_p2p_probe(
                self._handle(),
                integer(source, "source", "probe"),
                integer(tag, "tag", "probe", bits=64),
                timeout_ns(timeout),
                out,
            )
        )
        return _read_message(out)

    def iprobe(self, source: int = ANY_SOURCE, tag: int = ANY_TAG) -> Message | None:
        """As `probe`, without waiting: None if there is no such message now."""
        out = self._message
        status = lib.xccl_p2p_iprobe(
            self._handle(), integer(source, "source", "iprobe"), integer(tag, "tag", "iprobe", bits=64), out
        )
        check(status)
        return _read_message(out) if status == lib.XCCL_OK else None

    def _reap(self) -> None:
        """Lets go of dropped requests that are complete."""
        if not self._dropped:
            return
        pending = []
        for request, buffer in self._dropped[:]:
            if request is None or not lib.xccl_p2p_request_is_done(request):
                pending.append((request, buffer))
                continue
            if lib.xccl_p2p_request_test(request, self._message) < 0:
                self._lost.append(ffi.string(lib.xccl_error_message()).decode(errors="replace"))
            lib.xccl_p2p_request_free(request)
        self._dropped[:] = pending

    def _abandon_requests(self) -> None:
        """Leaves dropped requests to the C core, before close; their arrays live as long as the communicator.

        Raises XcclUsageError if one of them has failed, since nobody else would tell.
        """
        self._reap()
        if self._lost:
            failures = "\n".join(self._lost)
            self._lost.clear()
            raise XcclUsageError(f"rank {self.rank}, close: requests that nobody waited for had failed:\n{failures}")
        for index, (request, buffer) in enumerate(self._dropped):
            if request is not None:
                lib.xccl_p2p_request_free(request)
                self._dropped[index] = (None, buffer)


def _mode(mode: str, operation: str) -> int:
    try:
        return int(_MODES[mode])
    except KeyError:
        raise XcclUsageError(f"{operation}: mode is one of {', '.join(_MODES)}, got {mode!r}") from None
