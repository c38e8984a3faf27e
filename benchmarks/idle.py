"""CPU time of ranks that wait: eight receive from a ninth, which sleeps before it sends."""

from __future__ import annotations

import time

import numpy as np

import xccl

RANKS, SECONDS = 8, 1.0


def measure() -> float:
    """CPU seconds of all waiting ranks together, in and out of the kernel, for each second of waiting."""
    used: list[float] = xccl.run(_wait, RANKS + 1, timeout=60)
    return sum(used[:RANKS]) / SECONDS


def _wait(comm: xccl.Communicator) -> float:
    out = np.zeros(1)
    comm.barrier()
    start = time.process_time()
    if comm.rank < RANKS:
        comm.recv(out, RANKS)
    else:
        time.sleep(SECONDS)
        for rank in range(RANKS):
            comm.send(out, rank)
    return time.process_time() - start
