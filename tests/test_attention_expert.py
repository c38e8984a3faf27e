"""A2E and E2A against xccl.reference, over any number of attention and expert ranks, bit for bit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ae_support import SHAPES, MicroBatch, Roles, random_micro_batch, random_roles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moe_support import DTYPES, Layer, assert_same_numbers, check_rows, place, random_layer
from support import ranks

import xccl

PATHS = ["direct", "trampoline"]


# ---- the two sides ----


def receive_and_send(
    comm: xccl.Communicator, ae: xccl.AttentionExpert, roles: Roles, domain: int, batch: MicroBatch,
    local: np.random.Generator, heap: np.ndarray,
) -> None:  # fmt: skip
    """One micro-batch at an expert rank, with choices of its own."""
    me, sources = roles.expert_ranks.index(comm.rank), np.array(roles.domains[domain])
    expected = batch.received[me]
    out = None
    if local.random() < 0.3:
        shape = len(expected.recv_x) + int(local.integers(3)), batch.layer.hidden
        out = np.zeros(shape, batch.layer.dtype)
    which = None if len(roles.domains) == 1 or local.random() < 0.5 else domain
    if local.random() < 0.5:
        recv_x, handle = ae.a2e_recv(domain=which, out=out)
    else:
        recv_x, handle = ae.a2e_recv_async(domain=which, out=out)()
    assert handle.domain == domain
    check_rows(expected, sources, recv_x, handle, batch.layer)
    y = place(local.choice(["recv_x", "pool", "strided", "heap", "plain"]), batch.ys[me], ae, recv_x, heap)
    if local.random() < 0.5:
        ae.e2a_send(y, handle)
    else:
        ae.e2a_send_async(y, handle)()
    y[...] = 3  # nobody reads it any more


def send_and_sum(ae: xccl.AttentionExpert, me: int, batch: MicroBatch, local: np.random.Generator) -> None:
    """One micro-batch at an attention rank."""
    weighted = bool(batch.xs[0].shape[0] % 2)  # alike on all
    x, idx, weights = batch.xs[me].copy(), batch.idxs[me].copy(), batch.weights[me].copy()
    ae.a2e(x, idx, weights if weighted else None)
    x[...], idx[...], weights[...] = 7, -1, 7  # the caller's again
    result = np.zeros_like(x) if local.random() < 0.3 else None
    out = ae.e2a(out=result) if local.random() < 0.5 else ae.e2a_async(out=result)()
    assert result is None or out is result
    assert_same_numbers(out, batch.outs(weighted)[me], batch.layer)


def random_layers(comm: xccl.Communicator, num_attention: int, num_experts: int, path: str, seed: int) -> None:
    """Several layers and domains, micro-batches one after the other."""
    rng, local = np.random.default_rng(seed), np.random.default_rng((seed, comm.rank))
    heap = comm.zeros(1 << 16, np.uint8)
    for _ in range(4):
        num_domains = int(rng.integers(1, min(num_attention, 3) + 1))
        roles = random_roles(rng, comm.size, num_attention, num_experts, num_domains)
        layer = random_layer(rng, num_experts)
        with roles.open(comm, layer, path) as ae:
            assert ae.paths == (path,) * num_domains
            for _ in range(4):
                for domain, ranks_here in enumerate(roles.domains):
                    batch = random_micro_batch(rng, layer, roles, domain)
                    if comm.rank in ranks_here:
                        send_and_sum(ae, ranks_here.index(comm.rank), batch, local)
                    elif comm.rank in roles.expert_ranks:
                        receive_and_send(comm, ae, roles, domain, batch, local, heap)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("num_attention", "num_experts"), SHAPES)
def test_agrees_with_the_reference(num_attention: int, num_experts: int, path: str) -> None:
    xccl.run(random_layers, num_attention + num_experts, num_attention, num_experts, path, 7, timeout=120)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.parametrize("path", PATHS)
def test_agrees_on_any_shape(path: str, seed: int) -> None:
    """With ranks that take no part."""
    rng = np.random.default_rng(seed)
    num_attention, num_experts, idle = (int(rng.integers(low, 4)) for low in (1, 1, 0))
    xccl.run(random_layers, num_attention + num_experts + idle, num_attention, num_experts, path, seed, timeout=120)


# ---- micro-batches in flight ----


def two_in_flight(comm: xccl.Communicator, ae: xccl.AttentionExpert, roles: Roles, rng: np.random.Generator) -> None:
    """Two micro-batches of each domain at a time; all that are begun are completed in any order."""
    layer = Layer(1, ae.num_experts, ae.hidden, ae.num_topk, ae.num_max_tokens_per_rank, ae.dtype, ae.quant, None)
    local = np.random.default_rng(comm.rank)
    for _ in range(8):
        batches = [[random_micro_batch(rng, layer, roles, d) for _ in range(2)] for d in range(len(roles.domains))]
        if ae.role == "attention":
            mine, me = batches[ae.domain], roles.domains[ae.domain].index(comm.rank)
            for batch in mine:
                ae.a2e(batch.xs[me], batch.idxs[me], batch.weights[me])
            sums = [ae.e2a_async(), ae.e2a_async()]
            for i in local.permutation(2):
                assert_same_numbers(sums[i](), mine[i].outs()[me])
        elif ae.role == "expert":
            me, sources = roles.expert_ranks.index(comm.rank), [np.array(d) for d in roles.domains]
            order = [(d, i) for i in range(2) for d in range(len(batches))]
            received = {(d, i): ae.a2e_recv_async(domain=d) for d, i in order}
            sends = {}
            for d, i in local.permutation(order):
                recv_x, handle = received[d, i]()
                check_rows(batches[d][i].received[me], sources[d], recv_x, handle)
                recv_x[...] = batches[d][i].ys[me]
                sends[d, i] = ae.e2a_send_async(recv_x, handle)
            for key in local.permutation(order):
                sends[tuple(key)]()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("domains", [[[1]], [[0], [3]], [[0, 5], [2], [3, 4]]], ids=str)
def test_two_in_flight_completed_in_any_order(domains: list[list[int]], path: str) -> None:
    """Shapes change from one to the next, and the halves are used again and again (classes 7, 8)."""
    size = sum(map(len, domains)) + 3
    attention = {rank for domain in domains for rank in domain}
    roles = Roles(domains, [rank for rank in range(size) if rank not in attention])

    def body(comm: xccl.Communicator) -> None:
        with roles.open(comm, Layer(3, 7, 65, 3, 12, DTYPES[1], "int8", None), path) as ae:
            two_in_flight(comm, ae, roles, np.random.default_rng(3))

    xccl.run(body, size, timeout=60)


@pytest.mark.parametrize("path", PATHS)
@ranks(5)
def test_the_next_domain_waits_its_turn(comm: xccl.Communicator, path: str) -> None:
    """Its tokens are sent while the experts talk to the other; experts may choose the order."""
    roles = Roles([[0], [1, 2]], [3, 4])
    with xccl.AttentionExpert(comm, roles.domains, roles.expert_ranks, 4, 8, 2, 6, "float32", path=path) as ae:
        turns = [0, 1, 1, 0, 1, 0, 0, 1]
        for turn, domain in enumerate(turns):
            if ae.role == "attention":
                if ae.domain == domain:
                    x = np.full((comm.rank + 1, 8), turn, np.float32)
                    ae.a2e(x, np.tile([0, 3], (len(x), 1)))
                    np.testing.assert_array_equal(ae.e2a(), 2 * x)
            else:
                recv_x, handle = ae.a2e_recv(domain=domain)
                assert handle.domain == domain
                assert set(handle.src_rank.tolist()) == set(roles.domains[domain])
                assert (recv_x == turn).all()
                ae.e2a_send(recv_x, handle)


@pytest.mark.parametrize("path", PATHS)
@ranks(3, 5)
def test_a_half_is_not_overwritten_while_a_slow_peer_reads(comm: xccl.Communicator, path: str) -> None:
    """Attention runs ahead by as much as it can; experts are late, one more than the others (classes 6, 7)."""
    roles = Roles([list(range(comm.size // 2))], list(range(comm.size // 2, comm.size)))
    rng = np.random.default_rng(4)
    layer = Layer(len(roles.expert_ranks), 5, 300, 2, 8, DTYPES[0], None, None)
    batches = [random_micro_batch(rng, layer, roles, 0) for _ in range(10)]
    with roles.open(comm, layer, path) as ae:
        if ae.role == "attention":
            me = comm.rank
            for i, batch in enumerate(batches):
                ae.a2e(batch.xs[me], batch.idxs[me], batch.weights[me])
                if i > 0:
                    assert_same_numbers(ae.e2a(), batches[i - 1].outs()[me])
            assert_same_numbers(ae.e2a(), batches[-1].outs()[me])
        else:
            me = roles.expert_ranks.index(comm.rank)
            for batch in batches:
                recv_x, handle = ae.a2e_recv()
                time.sleep(0.01 * me)
                check_rows(batch.received[me], np.array(roles.domains[0]), recv_x, handle)
                y = batch.ys[me].copy() if me % 2 else recv_x
                y[...] = batch.ys[me]
                ae.e2a_send(y, handle)
                y[...] = np.nan


# ---- special routings ----


@pytest.mark.parametrize("path", PATHS)
@ranks(3, 4)
def test_ranks_without_tokens_take_part(comm: xccl.Communicator, path: str) -> None:
    """Many micro-batches in which most attention ranks, or all, have nothing to send (class 13)."""
    attention, experts = [0, comm.size - 1], list(range(1, comm.size - 1))
    with xccl.AttentionExpert(comm, attention, experts, 3, 8, 2, 4, "float32", path=path) as ae:
        for turn in range(150):
            if ae.role == "expert":
                recv_x, handle = ae.a2e_recv()
                ae.e2a_send(recv_x, handle)
                continue
            n = 1 if comm.rank == turn % comm.size else 0
            x, idx = np.full((n, 8), turn, np.float32), np.full((n, 2), turn % 3)
            ae.a2e(x, idx)
            np.testing.assert_array_equal(ae.e2a(), 2 * x)


@pytest.mark.parametrize("path", PATHS)
@ranks(3)
def test_a_layer_that_may_not_send_at_all(comm: xccl.Communicator, path: str) -> None:
    with xccl.AttentionExpert(comm, [0], [1, 2], 2, 5, 1, 0, quant="int8", path=path) as ae:
        for _ in range(4):
            if ae.role == "expert":
                recv_x, handle = ae.a2e_recv()
                assert recv_x.shape == (0, 5)
                ae.e2a_send(recv_x, handle)
            else:
                ae.a2e(np.zeros((0, 5), DTYPES[2]), np.zeros((0, 1), np.int64))
                assert ae.e2a().shape == (0, 5)


@pytest.mark.parametrize("path", PATHS)
@ranks(4)
def test_raw_int8_rows_and_scales(comm: xccl.Communicator, path: str) -> None:
    roles, rng, local = Roles([[1, 2]], [0, 3]), np.random.default_rng(2), np.random.default_rng(comm.rank)
    layer = Layer(2, 6, 130, 3, 9, DTYPES[2], "int8", None)
    with roles.open(comm, layer, path) as ae:
        for _ in range(6):
            batch = random_micro_batch(rng, layer, roles, 0)
            if ae.role == "attention":
                me = roles.domains[0].index(comm.rank)
                ae.a2e(batch.xs[me], batch.idxs[me], batch.weights[me])
                assert_same_numbers(ae.e2a(), batch.outs()[me])
                continue
            me = roles.expert_ranks.index(comm.rank)
            expected = batch.arrive(False)[me]
            out = np.zeros((len(expected.recv_x) + 1, layer.hidden), np.int8) if local.random() < 0.5 else None
            (q, scales), handle = ae.a2e_recv(dequantize=False, out=out)
            assert_same_numbers(q, expected.recv_x)
            assert_same_numbers(scales, expected.scales)
            ae.e2a_send(batch.ys[me], handle)


@st.composite
def routings(draw: st.DrawFn) -> list[list[list[list[int]]]]:
    """topk_idx of 2 attention ranks, for some micro-batches of a layer with 5 experts and top-3."""
    experts = st.integers(-1, 4)
    tokens = st.lists(st.lists(experts, min_size=3, max_size=3), max_size=5)
    return draw(st.lists(st.lists(tokens, min_size=2, max_size=2), min_size=1, max_size=12))


@given(plan=routings())
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_both_paths_give_the_same_bits_for_any_routing(plan: list[list[list[list[int]]]]) -> None:
    roles, layer = Roles([[0, 4]], [1, 2, 3]), Layer(3, 5, 19, 3, 5, DTYPES[0], None, [2, 0, 2, 1, 0])

    def body(comm: xccl.Communicator) -> None:
        rng = np.random.default_rng(1)
        with roles.open(comm, layer, "direct") as direct, roles.open(comm, layer, "trampoline") as trampoline:
            for lists in plan:
                idxs = [np.array(rows, np.int64).reshape(-1, 3) for rows in lists]
                xs = [rng.standard_normal((len(idx), 19)).astype(np.float32) for idx in idxs]
                weights = [rng.standard_normal(idx.shape).astype(np.float32) for idx in idxs]
                batch = MicroBatch(layer, 3, xs, idxs, weights)
                for ae in (direct, trampoline):
                    if comm.rank in (0, 4):
                        send_and_sum(ae, comm.rank // 4, batch, np.random.default_rng())
                    else:
                        receive_and_send(comm, ae, roles, 0, batch, np.random.default_rng(), np.zeros(0, np.uint8))

    xccl.run(body, 5, timeout=60)


# ---- metadata ----


@pytest.mark.parametrize(("num_attention", "num_experts"), [(1, 4), (2, 3), (3, 2)])
def test_an_attention_rank_updates_the_metadata_of_its_trampoline_only(num_attention: int, num_experts: int) -> None:
    """The paper's point: 1 update a micro-batch instead of one an expert rank."""
    attention, experts = list(range(num_attention)), list(range(num_attention, num_attention + num_experts))

    def body(comm: xccl.Communicator) -> None:
        for path in PATHS:
            with xccl.AttentionExpert(comm, attention, experts, 9, 8, 2, 6, "float32", path=path) as ae:
                for turn in range(1, 5):
                    if ae.role == "expert":
                        recv_x, handle = ae.a2e_recv()
                        ae.e2a_send(recv_x.copy(), handle)
                        continue
                    ae.a2e(np.ones((3, 8), np.float32), np.ones((3, 2), np.int64))
                    updates = turn * (1 if path == "trampoline" else num_experts)
                    assert ae.metadata_updates == updates
                    ae.e2a()
                    assert ae.metadata_updates == updates

    xccl.run(body, num_attention + num_experts, timeout=30)


@ranks(5)
def test_auto_takes_trampolines_for_fewer_attention_ranks(comm: xccl.Communicator) -> None:
    with xccl.AttentionExpert(comm, [[0], [1, 2]], [3, 4], 4, 8, 2, 6) as ae:
        assert ae.paths == ("trampoline", "direct")
        assert ae.path == "auto"


# ---- lost ranks ----


def lose(comm: xccl.Communicator, lost: int, path: str, call: Callable[[xccl.AttentionExpert], Any]) -> None:
    """Rank `lost` is killed after the first micro-batch; all others get its name in the second."""
    ae = xccl.AttentionExpert(comm, [0, 1], [2, 3, 4], 6, 8, 2, 6, "float32", path=path)
    call(ae)
    if comm.rank == lost:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(xccl.XcclPeerLost, match=f"rank {lost}"):
        repeat(3, call, ae)
    comm.shrink(timeout=20)  # nobody leaves before all have seen it


def repeat(times: int, call: Callable[[xccl.AttentionExpert], Any], ae: xccl.AttentionExpert) -> None:
    for _ in range(times):
        call(ae)


def one_micro_batch(ae: xccl.AttentionExpert) -> None:
    if ae.role == "attention":
        ae.a2e(np.ones((4, 8), np.float32), np.array([[0, 5], [2, 1], [3, 4], [5, -1]]))
        ae.e2a()
    else:
        recv_x, handle = ae.a2e_recv()
        ae.e2a_send(recv_x, handle)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lost", [1, 2, 4])
@ranks(5, keep_going=True)
def test_a_killed_rank_wakes_all(comm: xccl.Communicator, lost: int, path: str) -> None:
    """An attention rank, a trampoline, and an expert rank that is none."""
    lose(comm, lost, path, one_micro_batch)
