"""What AttentionExpert refuses, and what the message says; nothing may hang."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from moe_support import DTYPES
from support import ranks
from test_moe_errors import BAD_DISPATCH, READ_ONLY, refuses, tokens

import xccl

F32 = DTYPES[0]
PATHS = ["direct", "trampoline"]


def open_small(comm: xccl.Communicator, **changed: Any) -> xccl.AttentionExpert:
    arguments: dict[str, Any] = {
        "attention_ranks": [0],
        "expert_ranks": list(range(1, comm.size)),
        "num_experts": 4,
        "hidden": 8,
        "num_topk": 2,
        "num_max_tokens_per_rank": 6,
        "dtype": "float32",
    }
    return xccl.AttentionExpert(comm, **(arguments | changed))


def one_micro_batch(ae: xccl.AttentionExpert) -> None:
    if ae.role == "attention":
        ae.a2e(*tokens(3))
        np.testing.assert_array_equal(ae.e2a(), 2 * tokens(3)[0])
    elif ae.role == "expert":
        recv_x, handle = ae.a2e_recv()
        ae.e2a_send(recv_x, handle)


@ranks(2)
def test_bad_arrays(comm: xccl.Communicator) -> None:
    """Each is refused before anything is sent: the domain works as before, on the rank that erred too."""
    with open_small(comm) as ae:
        if ae.role == "attention":
            for message, changed in BAD_DISPATCH:
                arguments = dict(zip(("x", "topk_idx"), tokens(3), strict=True)) | changed
                if arguments.keys() <= {"x", "topk_idx", "topk_weights"}:
                    refuses(message, lambda arguments=arguments: ae.a2e(**arguments))
                    refuses("a2e on rank 0", lambda arguments=arguments: ae.a2e(**arguments))
            ae.a2e(*tokens(3))
            refuses("out has 2 rows, expected 3", lambda: ae.e2a(out=np.zeros((2, 8), F32)))
            refuses("out is read-only", lambda: ae.e2a(out=READ_ONLY))
            ae.e2a()
        else:
            refuses("out is float16 [6, 8]", lambda: ae.a2e_recv(out=np.zeros((6, 8), np.float16)))
            refuses("dequantize=False needs quant='int8'", lambda: ae.a2e_recv(dequantize=False))
            refuses("domain is 1, expected 0 to 0", lambda: ae.a2e_recv(domain=1))
            recv_x, handle = ae.a2e_recv()
            refuses("y is float32 [1, 8], expected float32 [6, 8]", lambda: ae.e2a_send(recv_x[:1], handle))
            refuses("y is float16", lambda: ae.e2a_send(recv_x.astype(np.float16), handle))
            refuses("rows of y must be contiguous", lambda: ae.e2a_send(np.zeros((6, 16), F32)[:, ::2], handle))
            ae.e2a_send(recv_x, handle)
        one_micro_batch(ae)


@ranks(3)
def test_roles(comm: xccl.Communicator) -> None:
    with open_small(comm, expert_ranks=[1]) as ae:
        assert ae.role == [None, "attention", "expert"][[2, 0, 1].index(comm.rank)]
        if ae.role != "attention":
            refuses(f"a2e on rank {comm.rank}: for attention ranks 0; this one is", lambda: ae.a2e(*tokens(1)))
            refuses("e2a on rank", lambda: ae.e2a())
        if ae.role != "expert":
            refuses(f"a2e_recv on rank {comm.rank}: for expert ranks 1; this one is", lambda: ae.a2e_recv())
            refuses("e2a_send on rank", lambda: ae.e2a_send(np.zeros((0, 8), F32), None))
        one_micro_batch(ae)
        if ae.role is None:
            refuses("neither attention nor expert rank", lambda: ae.a2e_recv())


@ranks(4)
def test_bad_constructor_arguments(comm: xccl.Communicator) -> None:
    """Refused alike on all ranks, before anybody waits."""
    for message, changed in (
        ("num_experts is 0, expected 1 to", {"num_experts": 0}),
        ("hidden is -3, expected 1 to", {"hidden": -3}),
        ("num_max_tokens_per_rank is -1, expected 0 to", {"num_max_tokens_per_rank": -1}),
        ("AttentionExpert: dtype is 'fp8', expected one of", {"dtype": "fp8"}),
        ("AttentionExpert: quant is 'fp8', expected None or 'int8'", {"quant": "fp8"}),
        ("path is 'best', expected 'auto', 'direct' or 'trampoline'", {"path": "best"}),
        ("attention_ranks is [], expected at least one rank", {"attention_ranks": []}),
        ("attention_ranks is [], expected at least one rank", {"attention_ranks": [[0], []]}),
        ("expected ranks or lists of ranks", {"attention_ranks": [0, [1]], "expert_ranks": [2]}),
        ("expert_ranks is 0.5", {"expert_ranks": 0.5}),
        ("rank 2 is named twice", {"attention_ranks": [0, 2], "expert_ranks": [1, 2]}),
        ("rank 1 is named twice", {"attention_ranks": [[0, 1], [1]], "expert_ranks": [2]}),
        ("rank 3 is named twice", {"expert_ranks": [3, 3]}),
        ("expert_ranks[1] is 4, expected a rank from 0 to 3", {"expert_ranks": [1, 4]}),
        ("attention_ranks[0] is -1, expected a rank from 0 to 3", {"attention_ranks": [-1, 2], "expert_ranks": [1]}),
        ("expert_map is int64 [3], expected the rank of each expert", {"expert_map": [1, 1, 1]}),
        ("expert_map[2] is 0, expected one of expert_ranks [1, 2, 3]", {"expert_map": [1, 2, 0, 1]}),
        ("exceed the 62 bits of an address space", {"hidden": 1 << 58}),
    ):
        refuses(message, lambda changed=changed: open_small(comm, **changed))
    with open_small(comm) as ae:
        one_micro_batch(ae)


@pytest.mark.parametrize(
    ("name", "mine", "theirs"),
    [
        ("num_experts", 4, 5),
        ("quant", None, "int8"),
        ("path", "direct", "auto"),
        ("expert_map", [1, 1, 2, 2], [1, 2, 2, 2]),
        ("expert_ranks", [1, 2], [1, 2, 3]),
        ("attention_ranks", [0], [3]),
    ],
)
@ranks(4)
def test_arguments_that_differ_between_ranks(comm: xccl.Communicator, name: str, mine: Any, theirs: Any) -> None:
    """All ranks learn of it, by name and rank, and can go on."""
    fixed = {"expert_ranks": [1, 2], "timeout": 20}
    with pytest.raises(xccl.XcclUsageError, match=f"{name}.*rank 1.* must be equal on all ranks"):
        open_small(comm, **(fixed | {name: theirs if comm.rank == 1 else mine}))
    with open_small(comm) as ae:
        one_micro_batch(ae)


@pytest.mark.parametrize("path", PATHS)
@ranks(3)
def test_handles_are_used_once_and_where_they_belong(comm: xccl.Communicator, path: str) -> None:
    with open_small(comm, path=path) as ae, open_small(comm, path=path) as other:
        if ae.role == "attention":
            refuses("no micro-batch waits for it: call a2e first", ae.e2a)
            ae.a2e(*tokens(2))
            hook = ae.e2a_async()
            refuses("no micro-batch waits for it: call a2e first", ae.e2a)
            hook()
            refuses("this hook has been called already", hook)
            ae.a2e(*tokens(2))
            ae.e2a()
        else:
            recv_x, handle = ae.a2e_recv()
            refuses("the handle is not one of this AttentionExpert's", lambda: other.e2a_send(recv_x, handle))
            refuses("the handle is not one of this AttentionExpert's", lambda: ae.e2a_send(recv_x, None))
            ae.e2a_send(recv_x, handle)
            refuses("cannot use micro-batch 1: it is not in flight", lambda: ae.e2a_send(recv_x, handle))
            hook = ae.a2e_recv_async()
            waiting = next(iter(ae._in_flight))
            refuses("cannot use micro-batch 2: its a2e_recv has not completed", lambda: ae.e2a_send(recv_x, waiting))
            recv_x, handle = hook()
            refuses("this hook has been called already", hook)
            hook = ae.e2a_send_async(recv_x, handle)
            refuses("an e2a_send that is in flight uses it already", lambda: ae.e2a_send(recv_x, handle))
            hook()
            refuses("this hook has been called already", hook)
    for call in (lambda: ae.a2e(*tokens(1)), ae.e2a, ae.a2e_recv, lambda: ae.empty(1)):
        refuses("this AttentionExpert is closed", call)
    ae.close()


@pytest.mark.parametrize("path", PATHS)
@ranks(3)
def test_a_third_micro_batch_in_flight(comm: xccl.Communicator, path: str) -> None:
    with open_small(comm, path=path) as ae:
        if ae.role == "attention":
            ae.a2e(*tokens(2))
            ae.a2e(*tokens(2))
            refuses("two micro-batches are in flight already", lambda: ae.a2e(*tokens(2)))
            refuses("2 micro-batches are in flight", ae.close)
            ae.e2a(), ae.e2a()
        else:
            done = [ae.a2e_recv(), ae.a2e_recv()]
            refuses("two micro-batches of this domain are in flight already", ae.a2e_recv_async)
            refuses("2 micro-batches are in flight", ae.close)
            for recv_x, handle in done:
                ae.e2a_send(recv_x, handle)


@pytest.mark.parametrize("path", PATHS)
@ranks(3)
def test_timeouts_name_who_is_missing_and_nothing_is_lost(comm: xccl.Communicator, path: str) -> None:
    """Whatever waits may be called again: a2e_recv, e2a, their hooks, and the hook of e2a_send."""
    go_on = comm.signal()
    with open_small(comm, path=path) as ae:
        if ae.role == "attention":
            comm.wait_until(go_on, "==", 2)
            ae.a2e(*tokens(3))
            with pytest.raises(xccl.XcclTimeout, match="rank 1") as caught:
                ae.e2a(timeout=0.2)
            assert "e2a" in str(caught.value)
            hook = ae.e2a_async()
            with pytest.raises(xccl.XcclTimeout, match="rank 1"):
                hook(timeout=0.1)
            for rank in (1, 2):
                comm.signal_op(go_on, 1, rank)
            np.testing.assert_array_equal(hook(), 2 * tokens(3)[0])
            return
        with pytest.raises(xccl.XcclTimeout, match="rank 0" if path == "direct" or comm.rank == 1 else "rank 1"):
            ae.a2e_recv(timeout=0.2)
        comm.signal_op(go_on, 1, 0, op="add")
        out = np.zeros((5, 8), F32)
        if comm.rank == 1:
            refuses("out has 5 rows, this rank received 6", lambda: ae.a2e_recv(out=out))
        assert not out.any()
        recv_x, handle = ae.a2e_recv()
        comm.wait_until(go_on, "==", 1)
        ae.e2a_send_async(recv_x, handle)()


@ranks(3)
def test_timeout_halfway_through_a_send_ends_the_group(comm: xccl.Communicator) -> None:
    ae, go_on = open_small(comm, path="trampoline"), comm.signal()
    if ae.role == "attention":
        ae.a2e(*tokens(2))
        comm.wait_until(go_on, "==", 1)
    elif comm.rank == 1:  # the trampoline
        recv_x, handle = ae.a2e_recv()
        with pytest.raises(xccl.XcclTimeout, match="rank 2"):
            ae.e2a_send(recv_x, handle, timeout=0.2)
        refuses("unusable since e2a_send failed halfway (XcclTimeout)", ae.a2e_recv)
        comm.signal_op(go_on, 1, 0)
        comm.signal_op(go_on, 1, 2)
    else:
        ae.a2e_recv()
        comm.wait_until(go_on, "==", 1)


@ranks(2)
def test_a_domain_that_is_gone_is_not_helped(comm: xccl.Communicator) -> None:
    """A trampoline lets go of a domain, or of its communicator, that still wants something of it."""
    part = comm.split(0)
    for closed in (False, True):
        ae = open_small(part, path="trampoline")
        if ae.role == "expert":
            ae.a2e_recv_async()
            if closed:
                part.close()
            else:
                del ae
        elif closed:
            part.close()
        comm.barrier()
        with open_small(comm, path="trampoline") as again:
            one_micro_batch(again)


@ranks(3)
def test_arrays_outlive_the_domain(comm: xccl.Communicator) -> None:
    """The pool is kept while any rank has an array in it, so a new one cannot write there."""
    ae = open_small(comm)
    recv_x = None
    if ae.role == "attention":
        ae.a2e(np.full((6, 8), 5, F32), np.zeros((6, 2), np.int64))
        ae.e2a()
    else:
        recv_x, handle = ae.a2e_recv()
        ae.e2a_send(recv_x, handle)
    ae.close()
    with open_small(comm) as again:
        one_micro_batch(again)
    assert recv_x is None or (recv_x == 5).all()


@pytest.mark.parametrize("path", PATHS)
@ranks(4)
def test_memory_comes_back(comm: xccl.Communicator, path: str) -> None:
    from xccl._binding import lib

    def used() -> list[int]:
        return [int(lib.xccl_heap_used(comm._world._w, area)) for area in (0, 1, 2)]

    before = used()
    for _ in range(10):
        with open_small(comm, attention_ranks=[[0], [3]], expert_ranks=[1, 2], path=path) as ae:
            if ae.role == "expert":
                one_micro_batch(ae)
            one_micro_batch(ae)
        assert used() == before
