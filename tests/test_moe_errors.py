"""What ExpertParallel refuses, and what the message says; nothing may hang."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_support import DTYPES, Layer, check_received, random_batch
from support import ranks

import xccl

F32 = DTYPES[0]


def open_small(comm: xccl.Communicator, **changed: Any) -> xccl.ExpertParallel:
    arguments: dict[str, Any] = {
        "num_experts": 4,
        "hidden": 8,
        "num_topk": 2,
        "num_max_tokens_per_rank": 6,
        "dtype": "float32",
    }
    return xccl.ExpertParallel(comm, **(arguments | changed))


def tokens(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.ones((n, 8), np.float32), np.zeros((n, 2), np.int64)


def refuses(match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(xccl.XcclUsageError, match=re.escape(match)):
        call()


READ_ONLY = np.zeros((6, 8), np.float32)
READ_ONLY.flags.writeable = False

BAD_DISPATCH: list[tuple[str, dict[str, Any]]] = [
    ("x is float64 [3, 8], expected float32 [rows, 8]", {"x": np.ones((3, 8))}),
    ("x is float32 [3, 9], expected float32 [rows, 8]", {"x": np.ones((3, 9), F32)}),
    ("x is float32 [24], expected float32 [rows, 8]", {"x": np.ones(24, F32)}),
    ("x must be C-contiguous", {"x": np.ones((3, 16), F32)[:, ::2]}),
    ("x must be a NumPy array, got list", {"x": [[1.0] * 8] * 3}),
    ("x has 7 tokens, expected at most num_max_tokens_per_rank = 6", {"x": tokens(7)[0], "topk_idx": tokens(7)[1]}),
    ("topk_idx is int32 [3, 2], expected int64 [3, 2]", {"topk_idx": np.zeros((3, 2), np.int32)}),
    ("topk_idx is int64 [3, 3], expected int64 [3, 2]", {"topk_idx": np.zeros((3, 3), np.int64)}),
    ("topk_idx must be C-contiguous", {"topk_idx": np.zeros((2, 3), np.int64).T}),
    ("topk_idx[1, 0] is 4, expected an expert from 0 to 3", {"topk_idx": np.array([[0, 1], [4, 1], [9, 1]])}),
    ("topk_idx[2, 1] is -2, expected an expert from 0 to 3, or -1", {"topk_idx": np.array([[0, 1], [3, -1], [0, -2]])}),
    ("topk_weights is float64 [3, 2], expected float32 [3, 2]", {"topk_weights": np.zeros((3, 2))}),
    ("topk_weights is float32 [2, 2], expected float32 [3, 2]", {"topk_weights": np.zeros((2, 2), F32)}),
    ("out is read-only", {"out": READ_ONLY}),
    ("out is int8 [6, 8], expected float32 [rows, 8]", {"out": np.zeros((6, 8), np.int8)}),
    ("dequantize=False needs quant='int8'", {"dequantize": False}),
]


@ranks(2)
def test_bad_dispatch_arguments(comm: xccl.Communicator) -> None:
    """Each is refused before anything is sent: the group works as before, on the rank that erred too."""
    with open_small(comm) as ep:
        for message, changed in BAD_DISPATCH:
            x, topk_idx = tokens(3)
            arguments = {"x": x, "topk_idx": topk_idx} | changed
            refuses(message, lambda arguments=arguments: ep.dispatch(**arguments))
            refuses(f"on rank {comm.rank}", lambda arguments=arguments: ep.dispatch(**arguments))
        recv_x, handle = ep.dispatch(*tokens(3))
        for message, changed in (
            ("y is float32 [1, 8], expected float32", {"y": np.zeros((1, 8), F32)}),
            ("y is float16", {"y": recv_x.astype(np.float16)}),
            ("y must be a NumPy array", {"y": recv_x.tolist()}),
            ("out overlaps y", {"out": recv_x[:3]}),
            ("out has 2 rows, expected 3", {"out": np.zeros((2, 8), F32)}),
            ("out is read-only", {"out": READ_ONLY}),
            ("topk_weights is float32 [3, 1], expected float32 [3, 2]", {"topk_weights": np.zeros((3, 1), F32)}),
            ("rows of y must be contiguous", {"y": np.zeros((len(recv_x), 16), F32)[:, ::2]}),
            ("rows of y must be contiguous", {"y": np.zeros((len(recv_x), 8), F32)[::-1]}),
            ("rows of y must be contiguous", {"y": np.broadcast_to(np.zeros(8, F32), recv_x.shape)}),
        ):
            if message.startswith(("rows of y", "y is float32", "out overlaps")) and len(recv_x) == 0:
                continue  # rank 1 has none of the experts
            refuses(message, lambda changed=changed: ep.combine(**{"y": recv_x, "handle": handle} | changed))
        np.testing.assert_array_equal(ep.combine(recv_x, handle), 2 * tokens(3)[0])


@ranks(1)
def test_bad_constructor_arguments(comm: xccl.Communicator) -> None:
    for message, changed in (
        ("num_experts is 0, expected 1 to", {"num_experts": 0}),
        ("hidden is -3, expected 1 to", {"hidden": -3}),
        ("num_topk is 0, expected 1 to", {"num_topk": 0}),
        ("num_max_tokens_per_rank is -1, expected 0 to", {"num_max_tokens_per_rank": -1}),
        ("num_experts must be a 64-bit integer, got 2.5", {"num_experts": 2.5}),
        ("dtype is 'float64', expected one of float32, float16, bfloat16", {"dtype": "float64"}),
        ("dtype is 'fp8', expected one of", {"dtype": "fp8"}),
        ("quant is 'fp8', expected None or 'int8'", {"quant": "fp8"}),
        ("expert_map is int64 [3], expected the rank of each expert: integers [4]", {"expert_map": [0, 0, 0]}),
        ("expert_map is float64 [4]", {"expert_map": [0.0] * 4}),
        ("expert_map[2] is 1, expected a rank from 0 to 0, or -1", {"expert_map": [0, 0, 1, 0]}),
        ("expert_map[1] is -2, expected a rank from 0 to 0, or -1", {"expert_map": [0, -2, 0, 0]}),
        ("on_missing is 'drop', expected 'raise', 'renormalize' or 'zero'", {"on_missing": "drop"}),
        ("expert_map[3] is 4294967296, expected a rank", {"expert_map": [0, 0, 0, 1 << 32]}),
        ("num_experts is 1099511627776, expected 1 to", {"num_experts": 1 << 40}),
        ("num_max_tokens_per_rank * num_topk is 4294967296", {"num_max_tokens_per_rank": 1 << 31 - 1, "num_topk": 4}),
    ):
        refuses(message, lambda changed=changed: open_small(comm, **changed))


@pytest.mark.parametrize(
    ("name", "mine", "theirs"),
    [
        ("num_experts", 4, 5),
        ("hidden", 8, 9),
        ("num_topk", 2, 3),
        ("num_max_tokens_per_rank", 6, 7),
        ("dtype", "float32", "float16"),
        ("quant", None, "int8"),
        ("expert_map", [0, 0, 1, 2], [0, 1, 1, 2]),
    ],
)
@ranks(3)
def test_arguments_that_differ_between_ranks(comm: xccl.Communicator, name: str, mine: Any, theirs: Any) -> None:
    """All ranks learn of it, by name and rank, and can go on."""
    with pytest.raises(xccl.XcclUsageError, match=f"{name}.*rank 1.*must be equal on all ranks"):
        open_small(comm, **{name: theirs if comm.rank == 1 else mine}, timeout=20)
    with open_small(comm) as ep:
        ep.combine(*ep.dispatch(*tokens(2)))


@ranks(1, 2)
def test_handles_are_used_once_and_where_they_belong(comm: xccl.Communicator) -> None:
    with open_small(comm) as ep, open_small(comm) as other:
        recv_x, handle = ep.dispatch(*tokens(1))
        refuses("the handle is not one of this ExpertParallel's", lambda: other.combine(recv_x, handle))
        refuses("the handle is not one of this ExpertParallel's", lambda: ep.combine(recv_x, None))
        ep.combine(recv_x, handle)
        refuses(
            "cannot use the handle of dispatch 1: a combine has used it already", lambda: ep.combine(recv_x, handle)
        )
        hook = ep.dispatch_async(*tokens(1))
        waiting = next(iter(ep._in_flight))
        refuses("its dispatch has not completed", lambda: ep.combine(recv_x, waiting))
        recv_x, handle = hook()
        refuses("this hook has been called already", hook)
        hook = ep.combine_async(recv_x, handle)
        refuses("a combine that is in flight uses it already", lambda: ep.combine_async(recv_x, handle))
        hook()
        refuses("this hook has been called already", hook)
        kept = ep.dispatch(*tokens(1))
    refuses("this ExpertParallel is closed", lambda: ep.combine(*kept))
    refuses("this ExpertParallel is closed", lambda: ep.dispatch(*tokens(1)))
    refuses("this ExpertParallel is closed", lambda: ep.empty(1))
    ep.close()


@ranks(1, 3)
def test_a_third_operation_in_flight(comm: xccl.Communicator) -> None:
    with open_small(comm) as ep:
        hooks = [ep.dispatch_async(*tokens(2)) for _ in range(2)]
        refuses("two dispatches are in flight already", lambda: ep.dispatch_async(*tokens(2)))
        refuses("2 operations are in flight", ep.close)
        done = [hook() for hook in hooks]
        done.append(ep.dispatch(*tokens(2)))
        hooks = [ep.combine_async(*d) for d in done[:2]]
        refuses("two combines are in flight already", lambda: ep.combine_async(*done[2]))
        for hook in hooks:
            np.testing.assert_array_equal(hook(), 2 * tokens(2)[0])
        np.testing.assert_array_equal(ep.combine(*done[2]), 2 * tokens(2)[0])


@ranks(2)
def test_out_too_small_is_an_error_not_a_truncation(comm: xccl.Communicator) -> None:
    ep = open_small(comm, expert_map=[0, 0, 1, 1])
    x, idx = np.ones((3, 8), np.float32), np.array([[0, 2]] * 3)
    out = np.zeros((5, 8), np.float32)
    refuses("out has 5 rows, this rank received 6", lambda: ep.dispatch(x, idx, out=out))
    assert not out.any()
    refuses("unusable since dispatch failed halfway", lambda: ep.dispatch(x, idx))


@ranks(2)
def test_ranks_that_combine_different_dispatches(comm: xccl.Communicator) -> None:
    ep = open_small(comm)
    done = [ep.dispatch(*tokens(2)) for _ in range(2)]
    mine, theirs = (2, 1) if comm.rank else (1, 2)
    with pytest.raises(xccl.XcclUsageError) as caught:
        ep.combine(*done[mine - 1])
    assert f"rank {1 - comm.rank} combines the handle of dispatch {theirs}, this rank that of dispatch {mine}" in str(
        caught.value
    )
    refuses("unusable since combine failed halfway", lambda: ep.dispatch(*tokens(1)))


@ranks(3)
def test_timeout_names_the_missing_rank_and_the_hook_can_be_called_again(comm: xccl.Communicator) -> None:
    layer = Layer(3, 4, 8, 2, 6, F32, None, None)
    batch = random_batch(np.random.default_rng(1), layer)
    go_on = comm.signal()
    with layer.open(comm) as ep:
        if comm.rank != 1:
            hook = ep.dispatch_async(batch.xs[comm.rank], batch.idxs[comm.rank])
            with pytest.raises(xccl.XcclTimeout, match="rank 1") as caught:
                hook(timeout=0.2)
            assert "dispatch" in str(caught.value)
            comm.signal_op(go_on, 1, 1, op="add")
        else:
            comm.wait_until(go_on, "==", 2)
            hook = ep.dispatch_async(batch.xs[comm.rank], batch.idxs[comm.rank])
        recv_x, handle = hook()
        check_received(batch, comm.rank, recv_x, handle)
        if comm.rank != 1:
            combine = ep.combine_async(recv_x, handle)
            with pytest.raises(xccl.XcclTimeout, match="rank 1"):
                combine(timeout=0.2)
            comm.signal_op(go_on, 1, 1, op="add")
        else:
            comm.wait_until(go_on, "==", 4)
            combine = ep.combine_async(recv_x, handle)
        combine()


@ranks(2)
def test_timeout_of_a_whole_call_ends_the_group(comm: xccl.Communicator) -> None:
    ep, go_on = open_small(comm), comm.signal()
    if comm.rank == 0:
        with pytest.raises(xccl.XcclTimeout, match="rank 1"):
            ep.dispatch(*tokens(2), timeout=0.2)
        refuses("unusable since dispatch failed halfway (XcclTimeout)", lambda: ep.dispatch(*tokens(2)))
        comm.signal_op(go_on, 1, 1)
    else:
        comm.wait_until(go_on, "==", 1)


def test_no_memory_is_an_error_and_nothing_is_lost(tmp_path: Path) -> None:
    """Rank 0 asks for more than the whole /dev/shm, which is refused before any page is taken."""
    shm = os.statvfs("/dev/shm")
    if shm.f_blocks == 0:
        pytest.skip("/dev/shm has no limit")
    size, hidden = 2, 1 << 20
    num_tokens = shm.f_blocks * shm.f_frsize // (hidden * 4) + 1

    def body(comm: xccl.Communicator) -> None:
        with open_small(comm, num_experts=size, num_topk=size, hidden=hidden, num_max_tokens_per_rank=num_tokens) as ep:
            everywhere = np.tile(np.arange(size), (num_tokens, 1))
            if comm.rank == 0:
                never_touched = tmp_path / "x"
                never_touched.touch()
                os.truncate(never_touched, num_tokens * hidden * 4)
                x = np.asarray(np.memmap(never_touched, np.float32, "r", shape=(num_tokens, hidden)))
                with pytest.raises(
                    xccl.XcclOutOfMemory, match=r"rank 0: dispatch needs \d+ bytes of shared memory, \d+ are free"
                ):
                    ep.dispatch(x, everywhere)
            x = np.full((1, hidden), comm.rank, np.float32)
            np.testing.assert_array_equal(ep.combine(*ep.dispatch(x, everywhere[:1])), size * x)

    xccl.rc.heap_size = 8 * size**2 * num_tokens * hidden * 4
    try:
        xccl.run(body, size, timeout=60)
    finally:
        del xccl.rc.heap_size


@ranks(2)
def test_without_pages_the_pool_gives_ordinary_arrays(comm: xccl.Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(status: int) -> None:
        raise xccl.XcclOutOfMemory("full")

    with open_small(comm) as ep:
        monkeypatch.setattr("xccl.row_pool.check", refuse)
        recv_x, handle = ep.dispatch(*tokens(2))
        assert ep._pool.live == 0
        np.testing.assert_array_equal(ep.combine(recv_x, handle), 2 * tokens(2)[0])


@ranks(2)
def test_a_closed_communicator(comm: xccl.Communicator) -> None:
    part = comm.split(0)
    ep = open_small(part)
    part.close()
    refuses("communicator is closed", lambda: ep.dispatch(*tokens(1)))


@ranks(2)
def test_arrays_outlive_the_group(comm: xccl.Communicator) -> None:
    """The pool is kept while any rank has an array in it, so a new group cannot write there."""
    ep = open_small(comm)
    recv_x, _ = ep.dispatch(np.full((6, 8), 5, np.float32), np.zeros((6, 2), np.int64))
    ep.close()
    with open_small(comm) as again:
        again.dispatch(np.full((6, 8), 9, np.float32), np.zeros((6, 2), np.int64))
    assert (recv_x == 5).all()
    assert len(recv_x) == (24 if comm.rank == 0 else 0)


@ranks(1, 3)
def test_memory_comes_back(comm: xccl.Communicator) -> None:
    from xccl._binding import lib

    def used() -> list[int]:
        return [int(lib.xccl_heap_used(comm._world._w, area)) for area in (0, 1, 2)]

    before = used()
    for _ in range(20):
        with open_small(comm) as ep:
            ep.combine(*ep.dispatch(*tokens(3)))
        assert used() == before
