"""Requests of non-blocking sends and receives, and what a receive tells about its message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from xccl._binding import check, entry, ffi, lib, timeout_ns
from xccl.errors import XcclError

if TYPE_CHECKING:
    from xccl.point_to_point import PointToPoint


class Message(NamedTuple):
    """What was received, found by probe, or sent."""

    source: int  #: rank in the communicator that sent it
    tag: int
    nbytes: int


entry.configure(check, Message, np.dtype(ml_dtypes.bfloat16))


class Request:
    """A pending isend or irecv. It keeps its array alive until the operation is complete.

    Requests may be completed in any order. A request that is dropped still completes: the communicator then keeps
    the array, and a send that could not be made is reported by `close`.
    """

    __slots__ = ("_buffer", "_comm", "_error", "_message", "_request")

    def __init__(self, comm: PointToPoint, request: Any, buffer: np.ndarray[Any, Any]) -> None:
        self._comm = comm
        self._request = request  # xccl_request_t *, None once complete
        self._buffer: np.ndarray[Any, Any] | None = buffer
        self._message: Message | None = None
        self._error: XcclError | None = None

    def test(self) -> Message | None:
        """Makes progress and returns the message if the operation is complete, otherwise None.

        Raises the error with which the operation ended (a receive of the wrong size, say), XcclPeerLost, XcclAborted.
        """
        if self._request is None:
            return self._outcome()
        out = ffi.new("xccl_message_t *")
        status = lib.xccl_p2p_request_test(self._request, out)
        return None if status == lib.XCCL_AGAIN else self._end(status, out)

    def wait(self, timeout: float | None = None) -> Message:
        """Returns the message when the operation is complete.

        After an XcclTimeout the request is still pending and may be waited for again. Raises as `test`.
        """
        if self._request is None:
            return self._outcome()
        out = ffi.new("xccl_message_t *")
        return self._end(lib.xccl_p2p_request_wait(self._request, timeout_ns(timeout), out), out)

    def _end(self, status: int, out: Any) -> Message:
        """Notes how the operation ended, unless only this call has failed."""
        try:
            check(status)
            self._message = Message(out.source, out.tag, out.bytes)
        except XcclError as error:
            if not lib.xccl_p2p_request_is_done(self._request):
                raise
            self._error = error
        lib.xccl_p2p_request_free(self._request)
        self._request = self._buffer = None
        return self._outcome()

    def _outcome(self) -> Message:
        if self._message is None:
            raise self._error or XcclError("this request has no outcome")
        return self._message

    def __del__(self) -> None:
        # Not the C core from here: the garbage collector may run in the middle of anything.
        if self._request is not None:
            self._comm._dropped.append((self._request, self._buffer))

    def __repr__(self) -> str:
        if self._request is not None:
            return "<xccl.Request pending>"
        return f"<xccl.Request failed: {self._error}>" if self._error else f"<xccl.Request complete: {self._message}>"
