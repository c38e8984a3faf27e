"""Little shared memory, as in a container: every layer works, or raises XcclOutOfMemory. Never SIGBUS."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import xccl

TELLING = re.compile(
    r"needs (\d+) bytes of shared memory, (\d+) are free: .*--shm-size|control page needs .*--shm-size"
)


@pytest.fixture
def tmpfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tmpfs for shared objects; `_resize` sets its size."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount")
    monkeypatch.setenv("XCCL_SHM_DIR", str(tmp_path))
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def _resize(tmpfs: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(tmpfs)], check=True)


def _use_every_layer(comm: xccl.Communicator) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    symmetric = comm.full(3000, comm.rank)
    comm.barrier()
    assert comm.ptr(symmetric, right)[-1] == right
    for count in (1, 1000, 100_000):  # inline, a block, the whole ring
        sending = comm.isend(np.full(count, comm.rank), right)
        received = np.empty(count, "int64")
        comm.recv(received, left)
        assert (received == left).all()
        sending.wait()
    for count in (10, 5000, 300_000):  # inline, staged, staged in turns
        assert (comm.all_reduce(np.ones(count)) == comm.size).all()
    group = comm.split(comm.rank % 2)
    assert group is not None
    group.barrier()
    _use_experts(comm)


def _use_experts(comm: xccl.Communicator) -> None:
    ep = xccl.ExpertParallel(comm, num_experts=8, hidden=128, num_topk=2, num_max_tokens_per_rank=2000)
    for tokens in (4, 100, 2000):  # staging and rows grow
        x = np.ones((tokens, 128), ml_dtypes.bfloat16)
        rows, handle = ep.dispatch(x, np.arange(2 * tokens).reshape(tokens, 2) % 8)
        out = ep.combine(rows, handle)
        assert (out == 2).all()


def _attempt(nranks: int) -> str:
    """Empty if all went well, else the error of the rank that ran out; anything but that fails the test."""
    try:
        xccl.run(_use_every_layer, nranks, timeout=60)
    except xccl.XcclOutOfMemory as error:
        return str(error)  # before any rank started
    except xccl.XcclAborted as error:
        if "XcclOutOfMemory" not in error.traceback_text:
            raise
        return error.traceback_text
    return ""


@pytest.mark.parametrize("nranks", [1, 2, 3])
def test_every_size_works_or_says_what_is_missing(tmpfs: Path, nranks: int) -> None:
    """XcclPeerLost here would be a rank killed by SIGBUS."""
    failures = 0
    for kib in (4, 16, 32, 48, 64, 96, 128, 160, 224, 320, 448, 640, 900, 1300, 1800, 2600, 3600, 5200, 7400, 65536):
        _resize(tmpfs, kib)
        problem = _attempt(nranks)
        if problem:
            failures += 1
            assert TELLING.search(problem) or "which has the details" in problem, problem
    assert failures > 5
    assert not problem, "64 MiB, as in a container, are enough"


def test_an_allocation_tells_what_all_ranks_need(tmpfs: Path) -> None:
    _resize(tmpfs, 8 << 10)

    def allocate(comm: xccl.Communicator) -> str:
        with pytest.raises(xccl.XcclOutOfMemory) as caught:
            comm.zeros(3 << 20, "uint8")
        assert (comm.full(100_000, 7) == 7).all()  # and goes on
        return str(caught.value)

    for message in xccl.run(allocate, 3, timeout=30):
        assert "allocation of 3145728 bytes on each of 3 ranks needs 9437184 bytes" in message
        found = TELLING.search(message)
        assert found
        assert int(found[2]) < 8 << 20


def test_xccl_run_tells_it_before_a_rank_starts(tmpfs: Path) -> None:
    _resize(tmpfs, 4)
    done = subprocess.run(
        [sys.executable, "-m", "xccl", "run", "-n", "200", "true"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert re.search(r"xccl: .*control page needs \d+ bytes.*--shm-size", done.stderr)
