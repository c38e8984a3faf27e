"""What a timeout tells: each awaited slot, the rank that was to bring it, and which rank is elsewhere."""

from __future__ import annotations

import os
import pickle
import signal
import time

import numpy as np
import pytest
from support import ranks

import xccl


@ranks(2, 3, 5)
def test_a_timeout_carries_what_is_missing(comm: xccl.Communicator) -> None:
    comm.barrier()
    late = comm.size - 1
    if comm.rank == late:
        time.sleep(1.5)
        return
    with pytest.raises(xccl.XcclTimeout) as caught:
        comm.all_to_all(np.zeros(comm.size), timeout=0.3)
    of_late = [slot for slot in caught.value.missing if slot.rank == late]
    assert of_late, caught.value.missing
    slot = of_late[0]
    assert slot.what == "message of the collective"
    assert slot.seen < slot.expected
    assert (slot.state, slot.operation) == ("alive", "barrier")
    assert slot.sequence > 0
    assert slot.idle >= 0
    assert pickle.loads(pickle.dumps(caught.value)).missing == caught.value.missing


@ranks(4)
def test_the_rank_that_is_elsewhere_is_named(comm: xccl.Communicator) -> None:
    begun = comm.signal()
    if comm.rank == 2:
        comm.wait_until(begun, "==", 3)
        time.sleep(1.5)
        return
    comm.signal_op(begun, 1, 2, op="add")
    with pytest.raises(
        xccl.XcclTimeout, match=r"\nRank 2 is at operation \d+ \(wait_until\), the others at \d+ \(all_"
    ):
        comm.all_reduce(np.zeros(3), timeout=0.7)


@ranks(2)
def test_a_stopped_rank_is_not_dead(comm: xccl.Communicator) -> None:
    pids = comm.all_gather(np.array([os.getpid()]))
    if comm.rank == 1:
        comm.recv(np.zeros(1), 0, timeout=30)
        return
    os.kill(int(pids[1, 0]), signal.SIGSTOP)
    try:
        with pytest.raises(xccl.XcclTimeout, match="stopped") as caught:
            comm.recv(np.zeros(1), 1, timeout=0.5)
    finally:
        os.kill(int(pids[1, 0]), signal.SIGCONT)
    assert caught.value.missing[0].state == "stopped"
    comm.send(np.zeros(1), 1)


@pytest.mark.parametrize(("first", "least"), [(None, 0.9), ("2", 1.9)])
def test_the_first_operation_may_take_longer(monkeypatch: pytest.MonkeyPatch, first: str | None, least: float) -> None:
    monkeypatch.setenv("XCCL_TIMEOUT", "0.5")
    if first is not None:
        monkeypatch.setenv("XCCL_FIRST_TIMEOUT", first)

    def wait_twice(comm: xccl.Communicator) -> list[float]:
        waited = []
        for _ in range(2):
            start = time.monotonic()
            with pytest.raises(xccl.XcclTimeout):
                comm.recv(np.zeros(1), 0)
            waited.append(time.monotonic() - start)
        return waited

    [waited] = xccl.run(wait_twice, 1)
    assert waited[0] >= least  # lower bounds only: a loaded machine may take longer for anything
    assert waited[1] >= 0.45
