"""Where shared objects lie, XCCL_SHM_DIR, what is verified, and what is swept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import xccl
from xccl._object import SharedObject, leftovers, open_published, sweep
from xccl._world import Observer, World

UNSHARE = ["unshare", "--net", "--ipc", "--pid", "--fork", "--mount-proc"]


@pytest.fixture
def shm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for shared objects; nothing may be left in it."""
    path = Path(tempfile.mkdtemp(prefix="test-", dir="/dev/shm"))
    monkeypatch.setenv("XCCL_SHM_DIR", str(path))
    yield path
    left = os.listdir(path)
    shutil.rmtree(path)
    assert left == []


def _publish_and_die(name: str) -> None:
    """Leaves a published object, as a rank 0 does that is killed before all have attached."""
    code = (
        f"from xccl._object import SharedObject; import os; SharedObject(2).publish({name!r}); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=30)
    assert done.returncode == -signal.SIGKILL


# ---- where it lies ----


def test_the_object_lies_in_the_directory_without_a_name(shm: Path) -> None:
    def look(comm: xccl.Communicator) -> tuple[str, list[str]]:
        return os.readlink(f"/proc/self/fd/{os.environ['XCCL_FD']}"), os.listdir(shm)

    link, names = xccl.run(look, 2, timeout=30)[0]
    assert link.startswith(f"{shm}/")
    assert names == []


def test_without_the_option_it_lies_in_dev_shm_without_a_name() -> None:
    shared = SharedObject(2)
    try:
        assert os.readlink(f"/proc/self/fd/{shared.fd}").startswith("/dev/shm/")
        assert os.fstat(shared.fd).st_nlink == 0
        assert os.fstat(shared.fd).st_mode & 0o777 == 0o600
    finally:
        shared.close()


@pytest.mark.parametrize(
    ("directory", "message"),
    [("/nowhere/at/all", "No such file or directory; it must be a directory on a tmpfs"), ("relative", "takes a dir")],
)
def test_a_wrong_directory_is_refused(directory: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XCCL_SHM_DIR", directory)
    with pytest.raises(xccl.XcclUsageError, match=message):
        xccl.run(lambda comm: None, 1)


def test_a_file_system_without_nameless_files_is_served(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # as kernels and file systems that do not know it answer
    assert xccl.run(lambda comm: comm.size, 2, timeout=30) == [2, 2]
    with pytest.raises(xccl.XcclSystemError, match="use a directory on a tmpfs"):
        _publish(SharedObject(2), "xccl-test")


def _publish(shared: SharedObject, name: str) -> None:
    try:
        shared.publish(name)
    finally:
        shared.close()


# ---- ranks that share only the directory ----

RANK = """
import os, sys, time
import xccl
comm = xccl.init()
print("names", [n for n in os.listdir(os.environ["XCCL_SHM_DIR"]) if not n.startswith("t-")], flush=True)
comm.barrier()
if len(sys.argv) > 1 and comm.rank == 1:
    time.sleep(60)
comm.barrier()
print(comm.all_gather(__import__("numpy").array([comm.rank])).ravel().tolist())
comm.barrier()
"""


def _start_ranks(prefix: list[str], size: int, *arguments: str) -> list[subprocess.Popen[str]]:
    job = {"WORLD_SIZE": str(size), "MASTER_ADDR": "test", "MASTER_PORT": "1", "XCCL_INIT_TIMEOUT": "20"}
    command = [*prefix, sys.executable, "-c", RANK, *arguments]
    return [
        subprocess.Popen(
            command,
            env=os.environ | job | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def _finish(ranks: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    try:
        return [rank.communicate(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.fixture
def unshare() -> list[str]:
    """A command that runs another in network, IPC and PID namespaces of its own, as containers have."""
    if shutil.which("unshare") is None or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0:
        pytest.skip("no right to make namespaces")
    return UNSHARE


def test_ranks_meet_by_name_and_the_name_goes(shm: Path) -> None:
    outputs = _finish(_start_ranks([], 3))
    assert [output.splitlines()[-1:] for output, _ in outputs] == [["[0, 1, 2]"]] * 3, outputs
    assert os.listdir(shm) == []


def test_ranks_in_containers_of_their_own_form_a_world(shm: Path, unshare: list[str]) -> None:
    outputs = _finish(_start_ranks(unshare, 2))
    assert [output.splitlines()[-1:] for output, _ in outputs] == [["[0, 1]"]] * 2, outputs


def test_a_death_in_another_pid_namespace_is_noticed(shm: Path, unshare: list[str]) -> None:
    """Its pid means nothing to the others; its lock tells."""
    ranks = _start_ranks([*unshare, "--kill-child"], 2, "wait")
    try:
        for rank in ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline().startswith("names")
        time.sleep(0.5)
        assert ranks[0].poll() is None, ranks[0].communicate()
        ranks[1].kill()
        outputs = _finish(ranks)
    finally:
        _finish(ranks)
    assert "XcclPeerLost: rank 0: barrier cannot complete, rank 1 is lost" in outputs[0][1]


def test_a_leftover_of_the_same_job_does_not_mislead(shm: Path) -> None:
    """The job is started again after a SIGKILL, with all its variables: no rank may take the dead world for its own."""
    name = f"xccl-{os.geteuid()}-test-1---0"
    _publish_and_die(name)
    assert os.listdir(shm) == [name]
    assert open_published(shm / name) is None
    outputs = _finish(_start_ranks([], 2))
    assert [output.splitlines()[-1:] for output, _ in outputs] == [["[0, 1]"]] * 2, outputs


def test_a_living_job_of_the_same_name_is_not_disturbed(shm: Path) -> None:
    shared = SharedObject(2)
    shared.publish("xccl-test")
    try:
        with pytest.raises(xccl.XcclUsageError, match="its rank 0 still lives"):
            _publish(SharedObject(2), "xccl-test")
        fd = open_published(shm / "xccl-test")
        assert fd is not None
        os.close(fd)
    finally:
        shared.close()


# ---- what is verified ----


def test_a_file_that_others_may_read_is_refused(shm: Path) -> None:
    path = shm / "xccl-test"
    path.write_bytes(b"x")
    path.chmod(0o644)
    with pytest.raises(xccl.XcclUsageError, match=r"not this user's shared memory: uid .*-rw-r--r--"):
        open_published(path)
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(xccl.XcclUsageError, match="cannot be opened"):
        open_published(path)
    path.unlink()


def test_another_session_or_size_is_refused() -> None:
    shared = SharedObject(2)
    try:
        with pytest.raises(xccl.XcclUsageError, match=r"is of session \w+, expected other"):
            World(shared.fd, 0, 2, "other")
        with pytest.raises(xccl.XcclUsageError, match="the job has 3 ranks, the world found has 2"):
            World(shared.fd, 0, 3, shared.session)
    finally:
        shared.close()


@pytest.mark.parametrize("offset", [0, 8, 12, 16, 24, 160, 168, 176, 200])
def test_a_damaged_control_page_is_refused(offset: int) -> None:
    """Words of the header: magic, ABI and owner, configuration, layout."""
    shared = SharedObject(2)
    try:
        os.pwrite(shared.fd, b"\xff\xff\xff\xff", offset)
        with pytest.raises(xccl.XcclUsageError, match=r"magic|ABI|uid|damaged|bytes"):
            Observer(shared.fd)
    finally:
        shared.close()


def test_an_observer_that_may_only_read_changes_nothing() -> None:
    shared = SharedObject(2)
    fd = os.open(f"/proc/self/fd/{shared.fd}", os.O_RDONLY)
    observer, other = Observer(fd), Observer(shared.fd)
    try:
        observer.abort("not allowed to")
        assert other.aborted_by() is None
        with pytest.raises(xccl.XcclUsageError, match="open for reading only"):
            World(fd, 0, 2, shared.session)
    finally:
        observer.close()
        other.close()
        os.close(fd)
        shared.close()


# ---- sweeping ----


def test_only_what_dead_creators_left_is_swept(shm: Path) -> None:
    living = SharedObject(2)
    living.publish("xccl-living")
    _publish_and_die("xccl-dead")
    (shm / "xccl-notes.txt").write_text("a user's own file, whose name begins like ours")
    (shm / f"xccl-{'0' * 24}").touch()
    try:
        assert [path.name for path in leftovers(shm)] == [f"xccl-{'0' * 24}", "xccl-dead"]
        assert len(sweep(shm)) == 2
        assert sorted(os.listdir(shm)) == ["xccl-living", "xccl-notes.txt"]
    finally:
        living.close()
        (shm / "xccl-notes.txt").unlink()


def test_the_next_start_sweeps(shm: Path) -> None:
    _publish_and_die("xccl-dead")
    assert xccl.run(lambda comm: os.listdir(shm), 1) == [[]]
