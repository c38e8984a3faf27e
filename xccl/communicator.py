"""The communicator: a group of ranks with the address space, send/receive and collectives."""

from __future__ import annotations

import atexit
import os
import weakref
from types import TracebackType
from typing import Any

from xccl import faults
from xccl._binding import check, entry, ffi, lib, timeout_ns
from xccl._world import World, abort_on_uncaught
from xccl.address_space import AddressSpace
from xccl.bootstrap import Place, find_place
from xccl.collectives import Collectives
from xccl.errors import XcclUsageError
from xccl.point_to_point import PointToPoint
from xccl.prepared import Prepared

# Operations that can be prepared: each has a method _NAME that checks its arguments and returns a Call.
PREPARABLE = (
    "barrier",
    "broadcast",
    "all_gather",
    "all_reduce",
    "reduce_scatter",
    "all_to_all",
    "send",
    "recv",
    "put",
    "get",
    "put_signal",
    "signal_op",
    "wait_until",
)


class Communicator(AddressSpace, PointToPoint, Collectives):
    """A group of ranks. Made by `xccl.init()` (all ranks) and `split` (some of them).

    Attributes
    ----------
    rank, size : int
        This process's rank in the group, and the number of ranks.
    """

    _prepared_type = Prepared

    def __init__(self, world: World, handle: Any, parent: Communicator | None = None) -> None:
        self._world = world
        self._parent = parent  # a group lives no longer than its world
        self._c = handle
        self._entry = entry.Comm(int(ffi.cast("uintptr_t", handle)))
        self.rank = int(lib.xccl_comm_rank(handle))
        self.size = int(lib.xccl_comm_size(handle))
        self._survivors: Communicator | None = None  # made of this one by shrink
        self._discard = weakref.finalize(self, _discard, world, handle)

    def split(self, color: int | None, key: int = 0, *, timeout: float | None = None) -> Communicator | None:
        """Makes a communicator of all ranks that give the same `color`, ordered by (key, rank). Collective.

        `color` is a number >= 0; with None the rank takes part in the call but gets None.
        """
        if color is not None and color < 0:
            raise XcclUsageError(f"split: color is a number >= 0 or None, got {color}")
        out = ffi.new("xccl_comm_t **")
        check(lib.xccl_comm_split(self._handle(), -1 if color is None else color, key, timeout_ns(timeout), out))
        return None if out[0] == ffi.NULL else type(self)(self._world, out[0], self)

    def shrink(self, *, timeout: float | None = None) -> Communicator:
        """Makes a communicator of the members that live, in the old order, after some were lost.

        To be called by all survivors once a call raised XcclPeerLost; they get the same members, even if more die
        meanwhile. This communicator is closed by it: its pending requests are dropped, its symmetric arrays stay
        valid on the survivors; closing it again closes the new one. Later deaths raise XcclPeerLost again. Ranks
        survive the death of others only where the launcher lets them: `xccl run --keep-going`,
        `xccl.run(..., keep_going=True)`.

        Raises XcclTimeout naming the members that neither came nor died (the call may then be repeated),
        XcclPeerLost if more than 64 deaths follow each other in the call.
        """
        out = ffi.new("xccl_comm_t **")
        check(lib.xccl_comm_shrink(self._handle(), timeout_ns(timeout), out))
        survivors = type(self)(self._world, out[0], self._parent)
        self._discard()
        self._entry.close()
        self._c = None
        self._survivors = survivors
        return survivors

    def prepare(self, operation: str, *args: Any, **keywords: Any) -> Prepared:
        """Checks an operation's arguments once; calling the result runs it on the same arrays again and again.

        `operation` is the name of a method ("all_to_all", "send", "put_signal", ...), the rest are its arguments:
        `op = comm.prepare("all_to_all", x, out=out); op()`. Local; what it prepares may be collective.

        Raises XcclUsageError for an operation that cannot be prepared, or what the operation raises for its
        arguments.
        """
        if operation not in PREPARABLE:
            raise XcclUsageError(f"prepare: operation is one of {', '.join(PREPARABLE)}, got {operation!r}")
        call = getattr(self, f"_{operation}")(*args, **keywords)
        return self._prepared_type(self, operation, call, (args, keywords, call[2]))

    def close(self, *, timeout: float | None = None) -> None:
        """Completes pending sends and leaves. Arrays stay readable, but no call works any more. Twice is no error.

        For a communicator made by `split` this is collective; the one of `xccl.init` each rank leaves alone.
        Raises XcclUsageError, and stays open, if a receive is still pending or messages that have arrived were never
        received: nothing is dropped in silence. Drop the request or receive them, and close again.
        """
        if self._survivors is not None:
            self._survivors.close(timeout=timeout)
        if self._c is None:
            return
        self._abandon_requests()
        check(lib.xccl_comm_close(self._handle(), timeout_ns(timeout)))
        self._discard.detach()
        self._c = None
        self._entry.close()
        if self._parent is None:
            self._world.detach()

    def abort(self, message: str) -> None:
        """Ends the world: every blocked or later call of every rank raises XcclAborted with `message`."""
        self._world.abort(message)

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an exception the others may be in the middle of an operation: it must end the world, not wait for them.
        if kind is None:
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._c is None else f"session {self._world.session}"
        return f"<xccl.Communicator rank {self.rank} of {self.size}, {state}>"

    def __reduce__(self) -> Any:
        raise XcclUsageError("a communicator belongs to its process and cannot be pickled")


def _discard(world: World, handle: Any) -> None:
    """A communicator that nobody closed gives back what it holds in this process."""
    lib.xccl_comm_discard(handle)


def init(comm: Any = None, *, timeout: float | None = None) -> Communicator:
    """Starts xccl in this process and returns the communicator of all ranks. Collective over the job.

    Parameters
    ----------
    comm
        An mpi4py communicator whose ranks shall form the world. Without it the ranks are those of `xccl run`,
        mpirun or torchrun; a process started by none of these is a world of its own (size 1).
    timeout : float, optional
        Seconds that a blocking call waits when it is given none (default: XCCL_TIMEOUT, 300 s).

    Raises
    ------
    XcclUsageError
        Wrong mpi4py for this mpirun, an unknown XCCL_* variable, a second init under a launcher.
    XcclTimeout
        Some ranks did not start in time (XCCL_INIT_TIMEOUT); they are named.
    """
    place = find_place(comm)
    try:
        world = _attach(place)
        if timeout is not None:
            lib.xccl_shm_set_timeout(world._w, timeout_ns(timeout))
        abort_on_uncaught(world, place.abort)
        world.wait_all_attached()
    finally:
        if place.created is not None:
            place.created.close()
    atexit.register(_leave, weakref.ref(world))
    return open_communicator(world)


def open_communicator(world: World) -> Communicator:
    """The communicator of all ranks of a world in which all have attached. Collective."""
    out = ffi.new("xccl_comm_t **")
    check(lib.xccl_comm_open(world._w, out))
    faults.follow(world)
    if lib.xccl_race_is_on(world._w):
        from xccl.racecheck import CheckedCommunicator  # a subclass

        return CheckedCommunicator(world, out[0])
    return Communicator(world, out[0])


def _attach(place: Place) -> World:
    try:
        world = World(place.fd, place.rank, place.size, place.session)
    finally:
        os.close(place.fd)
    # The kernel ends children of the launcher with it; a shell or a tool may stand between it and the rank.
    if os.environ.get("XCCL_LAUNCHER_PID", str(os.getppid())) != str(os.getppid()):
        world.die_with_creator()
    return world


def _leave(world: weakref.ref[World]) -> None:
    """A process that ends has left: its peers need not find out that it is gone."""
    alive = world()
    if alive is not None:
        alive.detach()
