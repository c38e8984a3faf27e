"""Expert parallelism that goes on without some ranks: the agreed mask, experts without a rank, what combine does."""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import re
import signal
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moe_support import DTYPES, Batch, Layer, assert_same_numbers, check_received, random_batch, random_layer
from support import ranks

import xccl
from xccl import reference

F32 = DTYPES[0]
POLICIES = ["raise", "renormalize", "zero"]
rounds = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def open_small(comm: xccl.Communicator, **changed: Any) -> xccl.ExpertParallel:
    return xccl.ExpertParallel(comm, 4, 8, 2, 6, dtype="float32", **changed)


def random_weights(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Of a softmax, or as odd as they may be."""
    if rng.random() < 0.5:
        return rng.random(shape).astype(F32)
    odd = [-1, 0, -0.0, 1e-45, 1e-38, 3e38, np.inf, -np.inf, np.nan, 0.3]
    return np.where(rng.random(shape) < 0.5, rng.choice(odd, shape), rng.standard_normal(shape)).astype(F32)


def random_mask(rng: np.random.Generator, size: int) -> list[bool]:
    return (rng.random(size) < rng.choice([0, 0.5, 1])).tolist()


def masked_batch(rng: np.random.Generator, layer: Layer, alive: list[bool]) -> Batch:
    batch = random_batch(rng, layer, alive)
    batch.weights = [random_weights(rng, idx.shape) for idx in batch.idxs]
    return batch


def check_missing(batch: Batch, rank: int, handle: xccl.Handle, weighted: bool) -> None:
    where = {"expert_map": batch.layer.expert_map, "alive": batch.alive}
    args = batch.idxs, batch.layer.num_experts
    with np.errstate(all="ignore"):
        weight = reference.missing_weights(*args, batch.weights if weighted else None, **where)[rank]
    assert_same_numbers(handle.missing_weight, weight)
    np.testing.assert_array_equal(handle.tokens_without_expert, reference.tokens_without_expert(*args, **where)[rank])


def one_round(
    comm: xccl.Communicator, ep: xccl.ExpertParallel, batch: Batch, rng: np.random.Generator, policy: str
) -> None:
    """A dispatch and a combine; policy is this rank's, ways to call are chosen at random by each rank alone."""
    rank, layer = comm.rank, batch.layer
    weighted, raw = bool(rng.random() < 0.7), layer.quant is not None and bool(rng.random() < 0.3)
    local = np.random.default_rng((int(rng.integers(2**32)), rank))
    weights = batch.weights[rank] if weighted else None
    first, second = (None, weights) if local.random() < 0.3 else (weights, None)

    got = (ep.dispatch_async if local.random() < 0.5 else ep.dispatch)(
        batch.xs[rank], batch.idxs[rank], first, dequantize=not raw
    )
    recv_x, handle = got() if isinstance(got, xccl.Hook) else got
    if raw:
        expected = batch.raw()[rank]
        assert_same_numbers(recv_x[0], expected.recv_x)
        assert_same_numbers(recv_x[1], expected.scales)
    else:
        check_received(batch, rank, recv_x, handle)
    check_missing(batch, rank, handle, first is not None)

    idx, live = batch.idxs[rank], ep.live_experts
    missing = np.flatnonzero(((idx >= 0) & ~live[idx]).any(axis=1)).tolist()
    out = np.zeros_like(batch.xs[rank]) if local.random() < 0.5 else None
    override = {"on_missing": policy} if policy != ep.on_missing else {}
    y = batch.ys[rank].copy()
    if local.random() < 0.5:
        complete = ep.combine_async(y, handle, second, out=out, **override)
    else:
        complete = functools.partial(ep.combine, y, handle, second, out=out, **override)
    if policy == "raise" and missing:
        with pytest.raises(xccl.XcclMissingExperts) as caught:
            complete()
        assert caught.value.tokens == tuple(missing)
    else:
        out = complete()
    check_missing(batch, rank, handle, weighted)
    if out is not None:
        expected_out = batch.outs(weighted, "zero" if policy == "raise" else policy)[rank]
        assert_same_numbers(out, expected_out, (layer, policy))


def several_layers(comm: xccl.Communicator, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(4):
        layer = random_layer(rng, comm.size)
        if rng.random() < 0.6:  # some experts have no rank
            owner = rng.integers(-1, comm.size, layer.num_experts)
            layer = dataclasses.replace(layer, expert_map=owner.tolist())
        policies = rng.choice(POLICIES, comm.size)
        with xccl.ExpertParallel(
            comm,
            layer.num_experts,
            layer.hidden,
            layer.num_topk,
            layer.max_tokens,
            layer.dtype,
            layer.quant,
            layer.expert_map,
            on_missing=rng.choice(policies),
        ) as ep:
            alive = [True] * comm.size
            for _ in range(5):
                if rng.random() < 0.7:
                    alive = random_mask(rng, comm.size)
                    ep.set_alive(alive)
                assert ep.alive.tolist() == alive
                live = [owner >= 0 and alive[owner] for owner in ep.expert_map]
                assert ep.live_experts.tolist() == live
                batch = masked_batch(rng, layer, alive)
                one_round(comm, ep, batch, rng, str(policies[comm.rank]))


@rounds
@given(seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("nranks", [1, 2, 3, 5])
def test_agrees_with_the_reference(nranks: int, seed: int) -> None:
    xccl.run(several_layers, nranks, seed, timeout=120)


@ranks(2, 4)
def test_a_handle_keeps_the_mask_of_its_dispatch(comm: xccl.Communicator) -> None:
    """The mask changes while two dispatches, and later two combines, are in flight."""
    rng = np.random.default_rng(3)
    layer = Layer(comm.size, 9, 65, 3, 12, DTYPES[1], "int8", None)
    rank = comm.rank
    with layer.open(comm) as ep:
        for _ in range(20):
            batches, hooks = [], []
            for _ in range(2):
                alive = random_mask(rng, comm.size)
                ep.set_alive(alive)
                batches.append(masked_batch(rng, layer, alive))
                hooks.append(ep.dispatch_async(batches[-1].xs[rank], batches[-1].idxs[rank], batches[-1].weights[rank]))
            ep.set_alive(random_mask(rng, comm.size))
            received = [hook() for hook in hooks]
            combines = []
            for batch, (recv_x, handle) in zip(batches, received, strict=True):
                check_received(batch, rank, recv_x, handle)
                combines.append(ep.combine_async(batch.ys[rank], handle, on_missing="renormalize"))
                ep.set_alive(random_mask(rng, comm.size))
            for batch, combine in zip(batches, combines, strict=True):
                assert_same_numbers(combine(), batch.outs(True, "renormalize")[rank])


@ranks(3)
def test_a_rank_that_raises_has_done_its_part(comm: xccl.Communicator) -> None:
    """Only rank 1 has tokens that miss an expert; nobody waits for it, and all go on in step."""
    x, hidden = np.ones((2, 8), F32), 8
    with open_small(comm) as ep:
        ep.set_alive([True, True, False])  # of experts 0 1 | 2 | 3
        for turn in range(50):
            idx = np.array([[0, 1], [2, 3 if comm.rank == 1 else 2]])
            recv_x, handle = ep.dispatch(x * turn, idx)
            out = np.full((2, hidden), np.nan, F32)
            combine = ep.combine if turn % 2 else lambda *a, **k: ep.combine_async(*a, **k)()
            if comm.rank == 1:
                match = r"combine on rank 1: 1 of 2 tokens .* the first is token 1: expert 3 of rank 2\."
                with pytest.raises(xccl.XcclMissingExperts, match=match) as caught:
                    combine(recv_x, handle, out=out, timeout=20)
                assert caught.value.tokens == (1,)
                assert out[:, 0].tolist() == [2 * turn, turn]
            else:
                assert combine(recv_x, handle, timeout=20)[:, 0].tolist() == [2 * turn, 2 * turn]
            with pytest.raises(xccl.XcclUsageError, match="a combine has used it already"):
                ep.combine(recv_x, handle)


@ranks(1)
def test_a_hook_that_raised_is_spent(comm: xccl.Communicator) -> None:
    with open_small(comm) as ep:
        ep.set_alive([False])
        recv_x, handle = ep.dispatch(np.ones((1, 8), F32), np.array([[0, -1]]))
        hook = ep.combine_async(recv_x, handle)
        with pytest.raises(xccl.XcclMissingExperts):
            hook()
        with pytest.raises(xccl.XcclUsageError, match="has been called already"):
            hook()


@ranks(2)
def test_reports_outlive_the_group(comm: xccl.Communicator) -> None:
    with open_small(comm, on_missing="zero") as ep:
        ep.set_alive([True, False])
        idx, weights = np.array([[0, 2], [3, 2], [-1, -1], [-1, 3]]), np.arange(8, dtype=F32).reshape(4, 2)
        recv_x, handle = ep.dispatch(np.ones((4, 8), F32), idx)
        assert handle.missing_weight.tolist() == [1, 2, 0, 1]
        ep.combine(recv_x, handle, weights)
    assert handle.missing_weight.tolist() == [1, 5, 0, 7]
    assert handle.missing_weight.dtype == F32
    assert handle.tokens_without_expert.tolist() == [1, 3]


@pytest.mark.parametrize("odd", [0, 1, 2])
@ranks(3)
def test_masks_that_differ(comm: xccl.Communicator, odd: int) -> None:
    """All ranks get the same error, whoever is at odds; nothing changes, and the group works."""
    good, bad = [True, False, True], [True, False, False]
    at, got = (1, True) if odd == 0 else (odd, False)  # rank 0 is the measure
    expected = f"mask[2] is {got} on rank {at}, expected {not got} as on rank 0: it must be equal on all ranks"
    with open_small(comm) as ep:
        ep.set_alive([False, True, True])
        with pytest.raises(xccl.XcclUsageError, match=re.escape(f"set_alive on rank {comm.rank}: {expected}")):
            ep.set_alive(bad if comm.rank == odd else good, timeout=20)
        assert ep.alive.tolist() == [False, True, True]
        _, handle = ep.dispatch(np.ones((1, 8), F32), np.array([[0, 2]]))
        assert handle.missing_weight.tolist() == [1]
        ep.set_alive(good)
        recv_x, handle = ep.dispatch(np.ones((1, 8), F32), np.array([[0, 2]]))
        assert ep.combine(recv_x, handle, on_missing="zero")[0, 0] == 1


@ranks(1, 2)
def test_what_set_alive_refuses_alone(comm: xccl.Communicator) -> None:
    with open_small(comm) as ep:
        wrong = [
            [True] * 3,
            [1] * comm.size,
            np.ones((comm.size, 1), bool),
            True,
            np.ones(comm.size),
            ["a"] * comm.size,
        ]
        for mask in wrong:
            with pytest.raises(xccl.XcclUsageError, match=rf"expected bool \[{comm.size}\], one a rank"):
                ep.set_alive(mask)
        recv_x, handle = ep.dispatch(np.ones((1, 8), F32), np.array([[0, 2]]))
        with pytest.raises(
            xccl.XcclUsageError, match="on_missing is 'skip', expected 'raise', 'renormalize' or 'zero'"
        ):
            ep.combine(recv_x, handle, on_missing="skip")
        with pytest.raises(ValueError, match="read-only"):
            ep.alive[0] = False
        ep.combine(recv_x, handle)
    with pytest.raises(xccl.XcclUsageError, match="this ExpertParallel is closed"):
        ep.set_alive([True] * comm.size)


@ranks(2)
def test_who_does_not_come_is_named(comm: xccl.Communicator) -> None:
    group = comm.split(0)
    ep = open_small(group)
    if comm.rank == 0:
        with pytest.raises(xccl.XcclTimeout, match=r"set_alive timed out.*\n.*of rank 1"):
            ep.set_alive([True, False], timeout=0.3)
    comm.barrier()


@ranks(2)
def test_all_dead_and_back(comm: xccl.Communicator) -> None:
    x, idx = np.ones((3, 8), F32), np.array([[0, 3], [2, -1], [-1, -1]])
    with open_small(comm, on_missing="renormalize") as ep:
        ep.set_alive([False, False])
        recv_x, handle = ep.dispatch(x, idx)
        assert recv_x.shape == (0, 8)
        assert ep.combine(recv_x, handle).tolist() == np.zeros((3, 8)).tolist()
        assert handle.tokens_without_expert.tolist() == [0, 1]
        ep.set_alive([True, True])
        recv_x, handle = ep.dispatch(x, idx)
        assert ep.combine(recv_x, handle, on_missing="raise")[:, 0].tolist() == [2, 1, 0]
        assert not handle.missing_weight.any()
        assert len(handle.tokens_without_expert) == 0


@ranks(2)
def test_a_layer_in_which_no_expert_has_a_rank(comm: xccl.Communicator) -> None:
    with open_small(comm, expert_map=[-1] * 4, on_missing="zero") as ep:
        assert ep.num_local_experts == 0
        assert not ep.live_experts.any()
        recv_x, handle = ep.dispatch(np.ones((2, 8), F32), np.array([[0, 1], [2, 3]]))
        assert not ep.combine(recv_x, handle).any()
        recv_x, handle = ep.dispatch(np.ones((1, 8), F32), np.array([[0, 3]]))
        with pytest.raises(xccl.XcclMissingExperts, match="expert 0 of no rank, expert 3 of no rank"):
            ep.combine(recv_x, handle, on_missing="raise")


def test_a_mask_of_more_ranks_than_one_agreement_holds() -> None:
    """The ranks that are compared last count too."""

    def body(comm: xccl.Communicator) -> None:
        ep = xccl.ExpertParallel(comm, comm.size, 1, 1, 0, dtype="float32")
        last = comm.size - 1
        mask = np.arange(comm.size) != last - (comm.rank == 7)
        with pytest.raises(
            xccl.XcclUsageError, match=rf"mask\[{last - 1}\] is False on rank 7, expected True as on rank 0"
        ):
            ep.set_alive(mask)

    xccl.run(body, 514, host="threads", timeout=120)


@pytest.mark.parametrize(
    ("weights", "kept"),
    [
        ([0.5, 0.25, 0.25], [2 / 3, 1 / 3]),
        ([0.5, 0.5, 0], [0.5, 0.5]),
        ([0, 0, 1], [0, 0]),  # what is left weighs nothing
        ([0, 0, 0], [0, 0]),
        ([0.5, 0, 0.25], [0.75, 0]),  # a sole weight becomes exactly the total
        ([0.5, -0.25, 0.25], [0.5, -0.25]),  # not weights of a mean: as they are
        ([0.5, 0.25, -0.25], [0.5, 0.25]),
        ([1e-45, 0, 1], [1, 0]),
        ([3e38, 0, 3e38], [3e38, 0]),  # the total is infinite
        ([0.5, 0.25, np.nan], [0.5, 0.25]),
        ([0.5, 0.25, np.inf], [0.5, 0.25]),
        (None, [1.5, 1.5]),
    ],
)
def test_renormalised_weights(weights: list[float] | None, kept: list[float]) -> None:
    """Experts 0 and 1 live, 2 does not; a second token misses nothing and keeps its weights."""

    def body(comm: xccl.Communicator) -> np.ndarray:
        owner = [0, 0, -1]
        with xccl.ExpertParallel(comm, 3, 2, 3, 2, "float32", expert_map=owner, on_missing="renormalize") as ep:
            x, idx = np.ones((2, 2), F32), np.array([[0, 1, 2], [0, -1, 1]])
            given = None if weights is None else np.array([weights, [0.5, 9, 0.125]], F32)
            recv_x, handle = ep.dispatch(x, idx, given)
            recv_x[...] = np.array([[1, 0], [1, 0], [0, 1], [0, 1]])  # which expert it was
            return ep.combine(recv_x, handle)

    out = xccl.run(body, 1, timeout=20)[0]
    np.testing.assert_allclose(out[0], np.array(kept, F32), rtol=1e-6)
    assert out[1].tolist() == ([1, 1] if weights is None else [0.5, 0.125])
    if weights == [0.5, 0, 0.25]:
        assert out[0, 0] == 0.75


def test_the_error_travels_between_processes() -> None:
    error = xccl.XcclMissingExperts("token 3", (3, 5))
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.tokens) == ("token 3", (3, 5))
    assert isinstance(error, xccl.XcclError)
    assert not isinstance(error, ValueError)


# ---- after a death ----


def decode(comm: xccl.Communicator, victim: int, dies_at: int, moment: int) -> tuple[list[int], int]:
    """Steps of decoding, in which each token's state is replaced by its layer's output. Returns sizes and steps.

    A survivor may be a step ahead of another when it hears of the death: all go back to the least.
    """
    layer = Layer(comm.size, 7, 24, 3, 5, F32, None, None)
    rng = np.random.default_rng(comm.rank)
    ep = layer.open(comm)
    states, step, sizes = {0: rng.standard_normal((5, 24)).astype(F32)}, 0, [comm.size]
    while step < 30:
        x = states[step]
        idx = np.argsort(-x[:, :7], axis=1)[:, :3].copy()
        weights = np.abs(np.take_along_axis(x, idx, axis=1))
        if len(sizes) == 1 and ep.comm.rank == victim and step == dies_at and moment == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            recv_x, handle = ep.dispatch(x, idx, weights, timeout=20)
            if len(sizes) == 1 and ep.comm.rank == victim and step == dies_at and moment == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            local = np.repeat(ep.local_experts, handle.num_recv_tokens_per_expert)
            y = (recv_x * (0.5 + local[:, None] / 8)).astype(F32)
            out = ep.combine(y, handle, on_missing="renormalize", timeout=20)
        except xccl.XcclPeerLost:
            comm = comm.shrink(timeout=20)
            ep = xccl.ExpertParallel(comm, 7, 24, 3, 5, F32, expert_map=ep.expert_map_on(comm))
            sizes.append(comm.size)
            step = int(comm.all_reduce(np.array([step]), "min")[0])
            continue
        check_token_sums(x, idx, weights, ep.live_experts, out)
        np.testing.assert_array_equal(handle.tokens_without_expert, np.flatnonzero(~ep.live_experts[idx].any(axis=1)))
        out /= np.maximum(np.abs(out).max(axis=1, keepdims=True), F32.type(1e-3))
        step += 1
        states = {step - 1: x, step: np.roll(out, 1, axis=1) + F32.type(0.01) * rng.standard_normal(out.shape, F32)}
    ep.close()
    comm.close()
    return sizes, step


def check_token_sums(x: np.ndarray, idx: np.ndarray, weights: np.ndarray, live: np.ndarray, out: np.ndarray) -> None:
    """Renormalised sums over the live experts, within rounding."""
    kept = np.where(live[idx], weights, 0).astype(np.float64)
    scale = weights.sum(axis=1) / np.maximum(kept.sum(axis=1), 1e-30)
    expected = (kept * (0.5 + idx / 8)).sum(axis=1) * scale
    np.testing.assert_allclose(out, expected[:, None] * x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("moment", [0, 1])
@pytest.mark.parametrize(("nranks", "victim"), [(2, 0), (4, 1), (4, 3)])
def test_survivors_go_on_with_the_old_numbers(nranks: int, victim: int, moment: int) -> None:
    results = xccl.run(decode, nranks, victim, 11, moment, timeout=60, keep_going=True)
    assert isinstance(results.pop(victim), xccl.XcclPeerLost)
    assert results == [([nranks, nranks - 1], 30)] * (nranks - 1)


@ranks(4, keep_going=True)
def test_a_map_on_fewer_and_fewer_ranks(comm: xccl.Communicator) -> None:
    """Ranks 0 and then 2 of the world are lost; the map follows, and may then be filled."""
    ep = open_small(comm, expert_map=[3, 0, 1, 2])
    for victim, owners in ((0, [2, -1, 0, 1]), (1, [1, -1, 0, -1])):
        assert ep.expert_map_on(comm).tolist() == ep.expert_map.tolist()
        if comm.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(xccl.XcclPeerLost):
            comm.barrier(timeout=20)
        comm = comm.shrink(timeout=20)
        assert ep.expert_map_on(comm).tolist() == owners
        ep = open_small(comm, expert_map=ep.expert_map_on(comm), on_missing="zero")
        assert ep.live_experts.tolist() == [owner >= 0 for owner in owners]
        recv_x, handle = ep.dispatch(np.ones((4, 8), F32), np.array([[0, -1], [1, -1], [2, -1], [3, -1]]))
        assert ep.combine(recv_x, handle)[:, 0].tolist() == [float(owner >= 0) for owner in owners]
        assert handle.tokens_without_expert.tolist() == [e for e, owner in enumerate(owners) if owner < 0]
    taken = np.where(ep.live_experts, ep.expert_map, comm.size - 1)  # rank 1 takes over
    with open_small(comm, expert_map=taken) as ep:
        recv_x, handle = ep.dispatch(np.ones((1, 8), F32), np.array([[1, 3]]))
        assert ep.combine(recv_x, handle)[0, 0] == 2


@ranks(3, keep_going=True)
def test_a_death_while_agreeing(comm: xccl.Communicator) -> None:
    ep = open_small(comm)
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(xccl.XcclPeerLost, match="rank 1"):
        ep.set_alive([True, False, True], timeout=20)
    comm = comm.shrink(timeout=20)
    with open_small(comm, expert_map=ep.expert_map_on(comm)) as ep:
        ep.set_alive([False, True])
        assert ep.live_experts.tolist() == [False, False, False, True]
