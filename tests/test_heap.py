"""The symmetric heap: same offsets everywhere, no overlap, nothing lost, clear refusals."""

from __future__ import annotations

import itertools
import os
import random

import numpy as np
import pytest
from support import ranks

import xccl
from xccl._binding import array_address, ffi, lib


def _offset(comm: xccl.Communicator, a: np.ndarray) -> int:
    out = ffi.new("uint64_t *")
    assert lib.xccl_gas_offset(comm._world._w, ffi.cast("void *", array_address(a)), max(a.nbytes, 1), out) == 0
    return int(out[0])


@ranks(1, 3)
def test_thousand_rounds_of_allocation_and_free_leak_nothing(comm: xccl.Communicator) -> None:
    random.seed(7)
    live: list[np.ndarray] = []
    for turn in range(1000):
        if live and random.random() < 0.5:
            comm.free(live.pop(random.randrange(len(live))))
        else:
            a = comm.zeros(random.choice([0, 1, 100, 5000, 70000]), "uint8")
            assert not a.any()
            a[...] = turn % 251 + 1
            live.append(a)
    spans = sorted((_offset(comm, a), max(a.nbytes, 1)) for a in live)
    assert all(start + size <= following for (start, size), (following, _) in itertools.pairwise(spans))
    for a in live:
        comm.free(a)
    assert lib.xccl_heap_used(comm._world._w, lib.XCCL_AREA_APP) == 0


@ranks(4)
def test_groups_allocate_independently(comm: xccl.Communicator) -> None:
    """Each member of an overlapping set of groups gets blocks that are free on all members, at one offset."""
    groups = [comm.split(comm.rank // 2), comm.split(comm.rank % 2), comm]
    random.seed(3)
    arrays = []
    for _ in range(30):
        group = random.choice(groups)
        assert group is not None
        a = group.zeros(random.choice([8, 1000, 20000]), "int64")
        offsets = [_offset(group, a)]
        exchanged = group.array(np.array(offsets))
        assert all(group.ptr(exchanged, pe)[0] == offsets[0] for pe in range(group.size))
        a[...] = comm.rank
        arrays.append(a)
    comm._sync(None)
    assert all((a == comm.rank).all() for a in arrays)


@ranks(3)
def test_a_rank_that_asks_for_something_else_is_named_on_all(comm: xccl.Communicator) -> None:
    with pytest.raises(xccl.XcclUsageError, match=r"rank 1 asks for 80 \(bytes\), rank 0 for 40"):
        comm.zeros(10 if comm.rank == 1 else 5)
    with pytest.raises(xccl.XcclUsageError, match="rank 2 asks for another shape or dtype"):
        comm.zeros(10, "int64" if comm.rank == 2 else "float64")
    a = comm.zeros(10)
    with pytest.raises(xccl.XcclUsageError, match="rank 1 calls free while rank 0 calls allocation"):
        comm.free(a) if comm.rank == 1 else comm.zeros(10)
    # the communicator goes on working
    comm.put(a, np.arange(10.0), (comm.rank + 1) % comm.size)
    comm._sync(None)
    assert a.tolist() == list(range(10))


@ranks(2)
def test_too_much_memory_tells_needed_and_free(comm: xccl.Communicator) -> None:
    free = os.statvfs("/dev/shm")
    too_much = free.f_bavail * free.f_frsize * 2
    with pytest.raises(xccl.XcclOutOfMemory, match=r"enlarge /dev/shm|failed on rank"):
        comm.empty(too_much, "uint8")
    with pytest.raises(xccl.XcclOutOfMemory, match="XCCL_HEAP_SIZE"):
        comm.empty(1 << 45, "uint8")
    a = comm.full(1000, 3)
    assert (a == 3).all()


@ranks(2)
def test_symmetric_memory_beyond_32_bits(comm: xccl.Communicator) -> None:
    """Bug class 12: offsets behind 4 GiB of address space."""
    low, high = comm.zeros(4, "int64"), None
    offset = ffi.new("uint64_t *")
    status = lib.xccl_heap_alloc(
        comm._handle(), lib.XCCL_AREA_APP, 5 << 30, lib.XCCL_HEAP_ADDRESS_ONLY, 0, lib.XCCL_TIMEOUT_DEFAULT, offset
    )
    assert status == 0
    high = comm.zeros(4, "int64")
    assert _offset(comm, high) - _offset(comm, low) > 4 << 30
    comm.put(high, np.arange(4) + comm.rank, 1 - comm.rank)
    comm._sync(None)
    assert high.tolist() == (np.arange(4) + 1 - comm.rank).tolist()
    assert not low.any()
