"""Numbers that users give to C calls, ids, enumerations, offsets: any of them gives a result or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import xccl
from xccl._binding import ffi, lib

TIMEOUT = 10**6  # ns: nobody else is there
INT32 = st.one_of(
    st.integers(-3, 20), st.sampled_from([2**31 - 1, -(2**31), 2**16, -(2**16)]), st.integers(-(2**31), 2**31 - 1)
)
INT64 = st.one_of(INT32, st.sampled_from([2**63 - 1, -(2**63), 2**62]), st.integers(-(2**63), 2**63 - 1))
ENUM = st.one_of(st.integers(0, 20), st.sampled_from([2**31 - 1, 2**31, 2**32 - 1]))  # as wide as C's
UINT64 = INT64.map(lambda value: value % 2**64)
AREA = st.integers(0, 2)  # an enumeration of the allocator: the caller is the package


@pytest.fixture(scope="module")
def comm() -> xccl.Communicator:
    return xccl.init()  # not closed: messages that it sent to itself are never received


def _calls(c: Any, word: Any, buffer: Any) -> dict[str, tuple[Callable[..., int], tuple[Any, ...]]]:
    """Each call with strategies for its free numbers."""
    seen, message, out = ffi.new("uint64_t *"), ffi.new("xccl_message_t *"), ffi.new("char[64]")
    request, group = ffi.new("xccl_request_t **"), ffi.new("xccl_comm_t **")
    return {
        "put": (lambda pe: lib.xccl_gas_put(c, word, buffer, 8, pe), (INT32,)),
        "get": (
            lambda pe, n: lib.xccl_gas_get(c, buffer, word, n, pe),
            (INT32, UINT64.filter(lambda n: not 8 < n <= 4096)),
        ),
        "ptr": (lambda n, pe: lib.xccl_gas_ptr(c, word, n, pe, ffi.new("void **")), (UINT64, INT32)),
        "signal_op": (lambda v, op, pe: lib.xccl_gas_signal_op(c, word, v, op, pe), (UINT64, ENUM, INT32)),
        "wait_until": (lambda cmp, v: lib.xccl_gas_wait_until(c, word, cmp, v, TIMEOUT, seen), (ENUM, UINT64)),
        "atomic": (
            lambda w, op, v, pe: lib.xccl_gas_atomic(c, word, w, op, v, v, pe, seen),
            (INT32, ENUM, UINT64, INT32),
        ),
        "free": (lambda area, at: lib.xccl_heap_free(c, area, at, TIMEOUT), (AREA, UINT64)),
        "isend": (
            lambda n, pe, tag, mode: lib.xccl_p2p_send(c, buffer, n % 41, pe, tag, mode, TIMEOUT),
            (UINT64, INT32, INT64, ENUM),
        ),
        "recv": (
            lambda n, pe, tag: lib.xccl_p2p_recv(c, buffer, n % 41, pe, tag, TIMEOUT, message),
            (UINT64, INT32, INT64),
        ),
        "probe": (lambda pe, tag: lib.xccl_p2p_iprobe(c, pe, tag, message), (INT32, INT64)),
        "broadcast": (
            lambda dtype, root: lib.xccl_coll_broadcast(c, buffer, 8, dtype, root, TIMEOUT, out),
            (ENUM, INT32),
        ),
        "all_reduce": (
            lambda dtype, op: lib.xccl_coll_all_reduce(c, buffer, 1, dtype, op, TIMEOUT, out),
            (ENUM, ENUM),
        ),
        "reduce_scatter": (
            lambda dtype, op: lib.xccl_coll_reduce_scatter(c, buffer, 1, dtype, op, TIMEOUT, out),
            (ENUM, ENUM),
        ),
        "all_gather": (lambda dtype: lib.xccl_coll_all_gather(c, buffer, 8, dtype, TIMEOUT, out), (ENUM,)),
        "split": (lambda color, key: _split(c, color, key, group), (INT64, INT64)),
        "irecv": (lambda pe, tag: _irecv(c, buffer, pe, tag, request), (INT32, INT64)),
    }


def _split(c: Any, color: int, key: int, out: Any) -> int:
    status = int(lib.xccl_comm_split(c, color, key, 10**9, out))
    return status if status < 0 or out[0] == ffi.NULL else int(lib.xccl_comm_close(out[0], 10**9))


def _irecv(c: Any, buffer: Any, pe: int, tag: int, out: Any) -> int:
    status = int(lib.xccl_p2p_iprobe(c, pe, tag, ffi.new("xccl_message_t *")))
    return (
        status if status != 0 else int(lib.xccl_p2p_recv(c, buffer, 8, pe, tag, TIMEOUT, ffi.new("xccl_message_t *")))
    )


NAMES = sorted(_calls(None, None, None))


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_calls(comm: xccl.Communicator, name: str) -> None:
    signal = comm.signal()
    word, buffer = ffi.cast("uint64_t *", signal.pointer), ffi.new("char[8192]")
    call, strategies = _calls(comm._handle(), word, buffer)[name]

    @settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
    @given(st.tuples(*strategies))
    def fuzz(numbers: tuple[int, ...]) -> None:
        status = call(*numbers)
        assert -7 <= status <= 1
        assert status >= 0 or ffi.string(lib.xccl_error_message())

    fuzz()


@settings(deadline=None, max_examples=150)
@given(st.lists(INT64, min_size=4, max_size=4), ENUM, INT32, st.lists(INT32, min_size=1, max_size=6))
def test_numbers_of_a_moe_layer(numbers: list[int], dtype: int, num_ranks: int, owner: list[int]) -> None:
    """The map has as many entries as experts are announced, so num_experts is true or refused before it is read."""
    experts = len(owner) if numbers[0] > 0 else numbers[0]
    config = ffi.new("xccl_moe_config_t *", [experts, *numbers[1:], dtype, 0, 0])
    out = ffi.new("xccl_moe_bytes_t *")
    status = lib.xccl_moe_bytes(config, num_ranks, ffi.new("int32_t[]", owner), out)
    assert status in (0, lib.XCCL_ERR_USAGE)


@settings(deadline=None, max_examples=80)
@given(st.lists(INT64, min_size=1, max_size=8))
def test_expert_ids(comm: xccl.Communicator, ids: list[int]) -> None:
    with xccl.ExpertParallel(comm, 5, 8, 1, 8, dtype="float32") as ep:
        x = np.ones((len(ids), 8), "float32")
        if all(-1 <= expert < 5 for expert in ids):
            received, handle = ep.dispatch(x, np.array(ids)[:, None])
            assert len(received) == sum(expert >= 0 for expert in ids)
            ep.combine(received, handle)
        else:
            with pytest.raises(xccl.XcclUsageError, match="topk_idx"):
                ep.dispatch(x, np.array(ids)[:, None])
