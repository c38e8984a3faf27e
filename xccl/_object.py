"""The shared object of a world: where it lies, who holds it, and what dead owners left of others.

It has no name: ranks get its descriptor from a parent or over a socket, so nothing is left whatever dies when. Only
with XCCL_SHM_DIR under mpirun or torchrun it has one while the ranks gather, because ranks in containers of their own
share no more than that directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any

from xccl import faults
from xccl._binding import check, ffi, lib
from xccl.cgroup import usable_cores
from xccl.errors import XcclOutOfMemory, XcclSystemError, XcclUsageError
from xccl.options import check_environment, rc

PREFIX = "xccl-"  # of every name


def shm_directory() -> Path:
    """Where shared objects lie: XCCL_SHM_DIR, or the place of POSIX shared memory."""
    return Path(rc.shm_dir or "/dev/shm")


class SharedObject:
    """A shared object as its creator has it. The creator holds it, by a lock that ends with the process.

    `fd` is for ranks; `session` is the id of the world.
    """

    def __init__(self, size: int, session: str | None = None) -> None:
        check_environment()
        if rc.faults:
            faults.load(rc.faults)  # a bad plan is told by the launcher, before any rank starts
        self.directory = shm_directory()
        self.session = session or secrets.token_hex(12)
        self._path: Path | None = None
        sweep(self.directory)
        self._held = _create_file(self.directory)
        try:
            check(lib.xccl_shm_format(self._held, _config(size, self.session)))
            # Without such locks (some sandboxes) a world still works: it only has no name, and /proc tells who lives.
            self._is_held = lib.xccl_shm_hold(self._held) == lib.XCCL_OK
            # The lock belongs to what was opened: ranks get the object opened anew, so that it is the creator's alone.
            self.fd = os.open(f"/proc/self/fd/{self._held}", os.O_RDWR | os.O_CLOEXEC)
        except BaseException:
            os.close(self._held)
            raise

    def publish(self, name: str) -> None:
        """Gives the object a name in its directory, for ranks that share only that. `close` takes it away."""
        if not self._is_held:
            raise XcclSystemError(f"XCCL_SHM_DIR={self.directory}: no file locks there; use a directory on a tmpfs")
        path = self.directory / name
        directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # With src_dir_fd this is linkat(2) with AT_SYMLINK_FOLLOW: the documented way to name such a file.
            os.link(f"/proc/self/fd/{self._held}", path, src_dir_fd=directory, follow_symlinks=True)
        except FileExistsError:
            raise XcclUsageError(f"another world is starting as {path}: its rank 0 still lives") from None
        except OSError as error:
            raise XcclSystemError(
                f"XCCL_SHM_DIR={self.directory}: the shared memory cannot get a name there ({error.strerror}); "
                "use a directory on a tmpfs"
            ) from error
        finally:
            os.close(directory)
        self._path = path

    def close(self) -> None:
        """Takes the name away, and lets go of the object. Ranks that have attached keep it."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None
        os.close(self._held)
        os.close(self.fd)


def open_published(path: Path) -> int | None:
    """Descriptor of the object that a living creator has published as `path`; None: there is none yet.

    Raises XcclUsageError if it belongs to somebody else.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise XcclUsageError(f"{path} cannot be opened as shared memory: {error.strerror}") from error
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        os.close(fd)
        raise XcclUsageError(
            f"{path} is not this user's shared memory: uid {found.st_uid}, mode {stat.filemode(found.st_mode)}; "
            f"expected uid {os.geteuid()}, mode -rw-------"
        )
    if lib.xccl_shm_is_held(fd) == 1:
        return fd
    os.close(fd)  # left by a dead creator; the new one removes it
    return None


def sweep(directory: Path) -> list[Path]:
    """Removes what dead creators left in `directory`; returns it. What a living process holds, or is not ours, stays.

    A creator holds its object by a lock that the kernel releases at its end, also across PID namespaces. So no pid
    that was given anew can deceive.
    """
    swept = []
    for path in leftovers(directory):
        with contextlib.suppress(OSError):
            path.unlink()
            swept.append(path)
    return swept


def leftovers(directory: Path) -> list[Path]:
    """This user's objects in `directory` whose creators are dead."""
    try:
        names = [name for name in os.listdir(directory) if name.startswith(PREFIX)]
    except OSError:
        return []
    return [path for path in (directory / name for name in sorted(names)) if _is_left(path)]


def _is_left(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return False
        if found.st_size == 0:  # its creator ended between making and unlinking it; one that lives does not mind
            return re.fullmatch(PREFIX + "[0-9a-f]{24}", path.name) is not None
        return bool(lib.xccl_shm_is_held(fd) == 0)
    finally:
        os.close(fd)


def _create_file(directory: Path) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            return _create_and_unlink(directory)
        where = f"XCCL_SHM_DIR={directory}" if rc.shm_dir else str(directory)
        text = f"no shared memory can be made in {where}: {error.strerror}"
        if error.errno == errno.ENOSPC:
            raise XcclOutOfMemory(f"{text}; in a container raise --shm-size") from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise XcclUsageError(f"{text}; it must be a directory on a tmpfs") from error
        raise XcclSystemError(f"{text}. xccl doctor tells more") from error


def _create_and_unlink(directory: Path) -> int:
    """For file systems that cannot make a file without a name."""
    path = directory / f"{PREFIX}{secrets.token_hex(12)}"
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    path.unlink(missing_ok=True)
    return fd


def _config(size: int, session: str) -> Any:
    return ffi.new(
        "xccl_config_t *",
        {
            "size": size,
            "cores": usable_cores(),
            "heap_bytes": rc.heap_size,
            "p2p_slot_bytes": rc.p2p_slot_size,
            "p2p_slots": rc.p2p_slots,
            "coll_block_bytes": rc.coll_block_size,
            "spin": rc.spin,
            "yields": rc.yields,
            "timeout_ns": int(rc.timeout * 1e9),
            "init_timeout_ns": int(rc.init_timeout * 1e9),
            "first_timeout_ns": int(rc.first_timeout * 1e9),
            "session": session.encode(),
            "chaos": rc.chaos,
            "racecheck": rc.racecheck == "1",
            "no_cma": rc.cma == "off",
        },
    )
