"""Where ranks run is seen and changed as asked."""

from __future__ import annotations

import os

import pytest
from support import ranks

import xccl
from xccl.bench.machine import place

CORES = sorted(os.sched_getaffinity(0))
needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")


@ranks(2, 3)
def test_ranks_are_pinned_by_default_if_each_can_have_a_core(comm: xccl.Communicator) -> None:
    machine = place(comm, None)
    assert machine.cores == CORES
    assert machine.ranks == comm.size
    assert machine.oversubscribed == (comm.size > len(CORES))
    assert bool(machine.pinned) == (comm.size <= len(CORES))
    if machine.pinned:
        assert os.sched_getaffinity(0) == {machine.pinned[comm.rank]}
        assert len(set(machine.pinned)) == comm.size


@needs_two_cores
@ranks(3)
def test_ranks_that_the_launcher_pinned_are_shown_as_pinned(comm: xccl.Communicator) -> None:
    own = CORES[(comm.rank + 1) % 2]
    os.sched_setaffinity(0, {own})
    machine = place(comm, None)
    assert machine.pinned == [CORES[1], CORES[0], CORES[1]]
    assert machine.cores == CORES[:2]
    assert os.sched_getaffinity(0) == {own}


@needs_two_cores
@ranks(2)
def test_ranks_that_may_move_are_not_pinned(comm: xccl.Communicator) -> None:
    os.sched_setaffinity(0, CORES[:1] if comm.rank == 0 else CORES[:2])
    machine = place(comm, False)
    assert machine.pinned == []
    assert machine.cores == CORES[:2]
