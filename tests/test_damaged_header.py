"""A control page whose words are damaged before ranks attach: an error, or a world that works."""

from __future__ import annotations

import contextlib
import os
import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import xccl
from xccl._binding import check, ffi, lib

SESSION = b"damaged"
WORDS = 48  # the header's
BORDERS = [0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 4096, 2**40]


def _attach(damage: list[tuple[int, int]]) -> None:
    """Formats an object for one rank, overwrites words of its header, attaches, and uses what attached."""
    fd = os.memfd_create("damaged-header")
    try:
        config = ffi.new("xccl_config_t *", {"size": 1, "heap_bytes": 1 << 24, "session": SESSION})
        check(lib.xccl_shm_format(fd, config))
        for word, value in damage:
            os.pwrite(fd, struct.pack("<Q", value), word * 8)
        world, comm, offset = ffi.new("xccl_world_t **"), ffi.new("xccl_comm_t **"), ffi.new("uint64_t *")
        check(lib.xccl_shm_attach(fd, 0, SESSION, world))
        try:
            check(lib.xccl_comm_open(world[0], comm))
            check(lib.xccl_heap_alloc(comm[0], lib.XCCL_AREA_APP, 4096, 0, 1, 10**9, offset))
            ffi.memmove(lib.xccl_gas_local(world[0], offset[0]), b"x" * 4096, 4096)
            lib.xccl_comm_discard(comm[0])
        finally:
            lib.xccl_shm_detach(world[0])
            lib.xccl_shm_unmap(world[0])
    finally:
        os.close(fd)


def test_undamaged() -> None:
    _attach([])


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.tuples(st.integers(0, WORDS - 1), st.one_of(st.sampled_from(BORDERS), st.integers(0, 2**64 - 1))),
        min_size=1,
        max_size=3,
    )
)
@example([(5, 3)])
def test_damaged(damage: list[tuple[int, int]]) -> None:
    with contextlib.suppress(xccl.XcclError):
        _attach(damage)


@pytest.mark.parametrize(("name", "value"), [("p2p_slots", 12), ("p2p_slot_bytes", 2**41), ("coll_block_bytes", 2**50)])
def test_a_configuration_out_of_range_makes_no_world(name: str, value: int) -> None:
    fd = os.memfd_create("out-of-range")
    try:
        with pytest.raises(xccl.XcclUsageError, match=name):
            check(lib.xccl_shm_format(fd, ffi.new("xccl_config_t *", {"size": 1, name: value, "session": SESSION})))
    finally:
        os.close(fd)
