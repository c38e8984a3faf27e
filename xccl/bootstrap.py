"""How a rank finds its world: the launcher's variables, MPI, torchrun's variables, or alone.

Every way ends in the same three things: a descriptor of the shared object, a rank, and the session id. The
launcher passes the descriptor by inheritance, MPI and torchrun ranks get it from rank 0 over a Unix socket
(which also proves that they share a host with it). With XCCL_SHM_DIR they find the object by its name in that
directory instead: ranks in containers of their own share no network namespace, so they cannot reach that socket.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from xccl._object import SharedObject, open_published, shm_directory
from xccl.errors import XcclError, XcclTimeout, XcclUsageError
from xccl.options import check_environment, rc


@dataclass(frozen=True)
class Place:
    """A rank's place in a world that is about to start. The descriptor belongs to the receiver.

    `session` is None if the object was found by a name that only this job has. `created` is the object that this rank
    made: to be closed once all have attached.
    """

    fd: int
    rank: int
    size: int
    session: str | None
    abort: Callable[[], Any] | None = None
    created: SharedObject | None = None


def launcher() -> str | None:
    """What started this process as a rank: "xccl run", "mpirun", "torchrun"; None: it is alone."""
    if "XCCL_FD" in os.environ:
        return "xccl run"
    if _mpi_size() > 0:
        return "mpirun"
    if "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE", "MASTER_PORT"} <= os.environ.keys():
        return "torchrun"
    return None


def find_place(comm: Any = None) -> Place:
    """Finds out how this process was started, and takes part in creating the shared object.

    `comm` is an mpi4py communicator or None. Collective over the ranks of the job.
    """
    check_environment()
    if comm is not None:
        return _place_from_mpi(comm)
    started_by = launcher()
    if started_by == "xccl run":
        return _place_from_launcher()
    if started_by == "mpirun" and _mpi_size() > 1:
        return _place_from_mpi(_world_of_mpi())
    if started_by == "torchrun":
        return _place_from_torchrun()
    return _place_of_creator(SharedObject(1), 1)


# ---- xccl run, xccl.run ----


def _place_from_launcher() -> Place:
    fd = int(os.environ["XCCL_FD"])
    try:
        own = os.dup(fd)
    except OSError:
        raise XcclUsageError(
            f"XCCL_FD={fd} is not open in this process: a program between the launcher and the rank closed it, "
            "or the variables were inherited by a child of a rank (remove the XCCL_* variables from its environment)"
        ) from None
    rank, size = int(os.environ["XCCL_RANK"]), int(os.environ["XCCL_WORLD_SIZE"])
    return Place(own, rank, size, os.environ["XCCL_SESSION"])


# ---- MPI ----


def _mpi_size() -> int:
    """Number of ranks that an mpirun started, 0 if none did."""
    for variable in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"):
        if variable in os.environ:
            return int(os.environ[variable])
    return 0


def _world_of_mpi() -> Any:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise XcclUsageError(
            f"started by mpirun with {_mpi_size()} ranks, but mpi4py cannot be imported ({error}): "
            "pip install 'xccl[mpi]', or start with: xccl run"
        ) from error
    if MPI.COMM_WORLD.size != _mpi_size():
        raise XcclUsageError(
            f"mpirun started {_mpi_size()} ranks, but mpi4py sees {MPI.COMM_WORLD.size}: it uses another MPI than this "
            f"mpirun ({MPI.Get_library_version().splitlines()[0]}). Use that MPI's mpirun, or point MPI4PY_LIBMPI at "
            "the library of this one"
        )
    return MPI.COMM_WORLD


def _place_from_mpi(comm: Any) -> Place:
    if not hasattr(comm, "Get_rank") or not hasattr(comm, "bcast"):
        raise XcclUsageError(f"init(comm=) takes an mpi4py communicator, got {type(comm).__name__}")
    rank, size = comm.Get_rank(), comm.Get_size()
    session = comm.bcast(secrets.token_hex(12) if rank == 0 else None, root=0)
    place = _share_object(f"xccl-{session}", rank, size, session)
    return replace(place, abort=lambda: comm.Abort(1))


# ---- torchrun ----

_torchrun_worlds = 0


def _place_from_torchrun() -> Place:
    global _torchrun_worlds
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        keys = [os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]]
    except (KeyError, ValueError) as error:
        raise XcclUsageError(
            f"started by torchrun, but RANK, WORLD_SIZE, MASTER_ADDR or MASTER_PORT is missing or bad ({error})"
        ) from error
    keys += [os.environ.get(key, "") for key in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]
    name = "-".join(["xccl", str(os.geteuid()), *keys, str(_torchrun_worlds)])
    _torchrun_worlds += 1
    return _share_object(name, rank, size)


# ---- from rank 0 to the others ----


def _share_object(name: str, rank: int, size: int, session: str | None = None) -> Place:
    """Rank 0 makes the object; the others get it from it, by the name in XCCL_SHM_DIR or over a socket."""
    deadline = time.monotonic() + rc.init_timeout
    if rank != 0:
        if rc.shm_dir:
            return Place(_await_published(name, rank, deadline), rank, size, session)
        fd, sent = _fetch_object(name, rank, deadline)
        return Place(fd, rank, size, sent)
    created = SharedObject(size, session)
    try:
        if rc.shm_dir:
            created.publish(name)
        else:
            _serve_object(name, created.fd, created.session, size - 1, deadline)
        return _place_of_creator(created, size)
    except BaseException:
        created.close()
        raise


def _place_of_creator(created: SharedObject, size: int) -> Place:
    return Place(os.dup(created.fd), 0, size, created.session, created=created)


def _await_published(name: str, rank: int, deadline: float) -> int:
    path = shm_directory() / name
    while (fd := open_published(path)) is None:
        if time.monotonic() > deadline:
            raise XcclTimeout(
                f"rank {rank}: rank 0 did not make {path} in time (XCCL_INIT_TIMEOUT). XCCL_SHM_DIR must be set for "
                "all ranks, and be the same directory of one host"
            )
        time.sleep(0.005)
    return fd


# An abstract Unix socket (first byte 0) has no file: it vanishes with the process that bound it.


def _check_peer(peer: socket.socket) -> None:
    _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if uid != os.geteuid():
        raise XcclError(f"a process of uid {uid} answers at the rendezvous of uid {os.geteuid()}: refusing its memory")


def _serve_object(name: str, fd: int, session: str, peers: int, deadline: float) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind("\0" + name)
        server.listen(peers + 1)
        for served in range(peers):
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                peer, _ = server.accept()
            except TimeoutError:
                raise XcclTimeout(
                    f"rank 0: {peers - served} of {peers + 1} ranks did not call xccl.init in time (XCCL_INIT_TIMEOUT)"
                ) from None
            with peer:
                _check_peer(peer)
                socket.send_fds(peer, [session.encode()], [fd])


def _fetch_object(name: str, rank: int, deadline: float) -> tuple[int, str]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        while True:
            try:
                server.connect("\0" + name)
                break
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise XcclTimeout(
                        f"rank {rank}: rank 0 did not open the rendezvous in time (XCCL_INIT_TIMEOUT). "
                        "All ranks must run on one host; in containers of their own they need XCCL_SHM_DIR"
                    ) from None
                time.sleep(0.005)
        server.settimeout(max(deadline - time.monotonic(), 0.001))
        _check_peer(server)
        message, fds, _, _ = socket.recv_fds(server, 256, 1)
    if not fds:
        raise XcclError(f"rank {rank}: rank 0 closed the rendezvous without sending the shared memory")
    return fds[0], message.decode()
