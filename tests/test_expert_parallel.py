"""dispatch and combine against xccl.reference, on any number of ranks, bit for bit."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moe_support import DTYPES, Batch, Layer, assert_same_numbers, check_received, place, random_batch, random_layer
from support import ranks

import xccl

rounds = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 2**32 - 1)


def one_round(
    comm: xccl.Communicator, ep: xccl.ExpertParallel, batch: Batch, rng: np.random.Generator, heap: np.ndarray
) -> None:
    """A dispatch and a combine with arguments chosen at random, alike on all ranks except for local choices."""
    rank, layer = comm.rank, batch.layer
    weights_at = rng.choice(["dispatch", "combine", "both", "none"])
    local = np.random.default_rng((int(rng.integers(2**32)), rank))
    what = (layer, weights_at)
    x, idx, weights = batch.xs[rank], batch.idxs[rank], batch.weights[rank]

    x_copy, idx_copy = x.copy(), idx.copy()
    first = {"dispatch": weights, "both": weights * 2}.get(weights_at)
    out = None
    if local.random() < 0.3:
        out = np.zeros((len(batch.received[rank].recv_x) + int(local.integers(3)), layer.hidden), layer.dtype)
    if local.random() < 0.5:
        recv_x, handle = ep.dispatch(x_copy, idx_copy, first, out=out)
    else:
        hook = ep.dispatch_async(x_copy, idx_copy, first, out=out)
        x_copy[...], idx_copy[...] = 7, -1  # the caller's again
        recv_x, handle = hook()
    check_received(batch, rank, recv_x, handle, what)
    assert out is None or np.shares_memory(recv_x, out) or not recv_x.size

    y = place(local.choice(["recv_x", "pool", "strided", "heap", "plain"]), batch.ys[rank], ep, recv_x, heap)
    second = {"combine": weights, "both": weights}.get(weights_at)
    result = np.zeros_like(x) if local.random() < 0.3 else None
    if local.random() < 0.5:
        combined = ep.combine(y, handle, second, out=result)
    else:
        combined = ep.combine_async(y, handle, second, out=result)()
    y[...] = 3  # nobody reads it any more
    assert result is None or combined is result
    assert_same_numbers(combined, batch.outs(weights_at != "none")[rank], what)


def several_layers(comm: xccl.Communicator, seed: int, num_layers: int = 6, num_rounds: int = 4) -> None:
    rng = np.random.default_rng(seed)
    heap = comm.zeros(1 << 16, np.uint8)
    for _ in range(num_layers):
        layer = random_layer(rng, comm.size)
        with layer.open(comm) as ep:
            for _ in range(num_rounds):
                one_round(comm, ep, random_batch(rng, layer), rng, heap)


@rounds
@given(seed=seeds)
@pytest.mark.parametrize("nranks", [1, 2, 3, 4, 8])
def test_agrees_with_the_reference(nranks: int, seed: int) -> None:
    xccl.run(several_layers, nranks, seed, timeout=120)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant", [None, "int8"])
@ranks(2)
def test_large_rows(comm: xccl.Communicator, dtype: np.dtype, quant: str | None) -> None:
    rng = np.random.default_rng(5)
    layer = Layer(2, 16, 7168, 8, 40, dtype, quant, None)
    with layer.open(comm) as ep:
        for _ in range(3):
            one_round(comm, ep, random_batch(rng, layer), rng, comm.zeros(64, np.uint8))


@ranks(1, 2, 5)
def test_raw_int8_rows_and_scales(comm: xccl.Communicator) -> None:
    rng = np.random.default_rng(2)
    for _ in range(10):
        layer = random_layer(rng, comm.size)
        if layer.quant is None:
            continue
        batch = random_batch(rng, layer)
        expected = batch.raw()[comm.rank]
        with layer.open(comm) as ep:
            for out in (None, np.zeros((len(expected.recv_x) + 1, layer.hidden), np.int8)):
                (q, scales), handle = ep.dispatch(batch.xs[comm.rank], batch.idxs[comm.rank], dequantize=False, out=out)
                assert_same_numbers(q, expected.recv_x)
                assert_same_numbers(scales, expected.scales)
                combined = ep.combine(batch.ys[comm.rank], handle)
                assert_same_numbers(combined, batch.outs(False)[comm.rank])


@ranks(1, 2, 4, 7)
def test_two_in_flight_completed_in_any_order(comm: xccl.Communicator) -> None:
    """Shapes change from one operation to the next, and the halves are used again and again (classes 7, 8)."""
    rng = np.random.default_rng(3)
    layer = Layer(comm.size, 9, 65, 3, 12, DTYPES[1], "int8", None)
    rank = comm.rank
    with layer.open(comm) as ep:
        for _ in range(20):
            batches = [random_batch(rng, layer) for _ in range(2)]
            order = rng.permutation(2)
            hooks = [ep.dispatch_async(b.xs[rank], b.idxs[rank], b.weights[rank]) for b in batches]
            received = {i: hooks[i]() for i in order}
            for i, (recv_x, handle) in received.items():
                check_received(batches[i], rank, recv_x, handle)
            combines = {i: ep.combine_async(batches[i].ys[rank], received[i][1]) for i in (0, 1)}
            for i in order[::-1]:
                assert_same_numbers(combines[i](), batches[i].outs(True)[rank])


@ranks(1, 2, 3)
def test_bits_do_not_depend_on_how_rows_are_written(comm: xccl.Communicator) -> None:
    """Through the caches or past them: the group tries both ways now and then, and shapes change in between."""
    rng = np.random.default_rng(6)
    rank = comm.rank
    for quant in (None, "int8"):
        layer = Layer(comm.size, 5, 200, 3, 6, DTYPES[2], quant, None)
        batches = [random_batch(rng, layer) for _ in range(5)]
        with layer.open(comm) as ep:
            for i in range(300):
                batch = batches[i % len(batches)]
                recv_x, handle = ep.dispatch(batch.xs[rank], batch.idxs[rank], batch.weights[rank])
                check_received(batch, rank, recv_x, handle, i)
                if i % 7:
                    recv_x[...] = batch.ys[rank]
                    assert_same_numbers(ep.combine(recv_x, handle), batch.outs(True)[rank], i)


@ranks(2, 3)
def test_a_part_is_not_overwritten_while_a_slow_peer_reads(comm: xccl.Communicator) -> None:
    """Rank 0 runs ahead by as much as it can; the others receive late (classes 6, 7)."""
    rng = np.random.default_rng(4)
    layer = Layer(comm.size, 5, 300, 2, 8, DTYPES[0], None, None)
    rank = comm.rank
    batches = [random_batch(rng, layer) for _ in range(12)]
    with layer.open(comm) as ep:
        hooks = [ep.dispatch_async(b.xs[rank], b.idxs[rank]) for b in batches[:2]]
        for i, batch in enumerate(batches):
            if rank:
                time.sleep(0.02)
            recv_x, handle = hooks.pop(0)()
            if i + 2 < len(batches):
                hooks.append(ep.dispatch_async(batches[i + 2].xs[rank], batches[i + 2].idxs[rank]))
            check_received(batch, rank, recv_x, handle)


@ranks(2, 3)
def test_outputs_in_place_stay_until_a_slow_peer_has_read_them(comm: xccl.Communicator) -> None:
    rng = np.random.default_rng(6)
    layer = Layer(comm.size, 5, 3000, 4, 8, DTYPES[0], None, None)
    rank = comm.rank
    with layer.open(comm) as ep:
        for _ in range(8):
            batch = random_batch(rng, layer)
            recv_x, handle = ep.dispatch(batch.xs[rank], batch.idxs[rank])
            recv_x[...] = batch.ys[rank]
            hook = ep.combine_async(recv_x, handle)
            if rank == comm.size - 1:
                time.sleep(0.03)
            combined = hook()
            recv_x[...] = np.nan
            assert_same_numbers(combined, batch.outs(False)[rank])


@ranks(2, 3)
def test_a_copied_output_is_not_overwritten_while_a_slow_peer_reads(comm: xccl.Communicator) -> None:
    """The hook of a combine whose y was copied does not wait for readers: its stage must."""
    rng = np.random.default_rng(10)
    layer = Layer(comm.size, 5, 300, 2, 8, DTYPES[0], None, None)
    rank = comm.rank
    with layer.open(comm) as ep:
        batches = [random_batch(rng, layer) for _ in range(8)]
        handles = [ep.dispatch(b.xs[rank], b.idxs[rank])[1] for b in batches]
        combines = iter([(b.ys[rank].copy(), handle) for b, handle in zip(batches, handles, strict=True)])
        hooks = [ep.combine_async(*next(combines)) for _ in range(2)]
        for batch in batches:
            if rank:
                time.sleep(0.02)
            assert_same_numbers(hooks.pop(0)(), batch.outs(False)[rank])
            hooks += [ep.combine_async(*c) for c in [next(combines, None)] if c]


@ranks(1, 4)
def test_ranks_without_tokens_take_part(comm: xccl.Communicator) -> None:
    """Many operations in which most ranks, or all, have nothing to send (class 13)."""
    layer = Layer(comm.size, 3, 8, 2, 4, DTYPES[0], None, None)
    with layer.open(comm) as ep:
        for turn in range(300):
            n = 1 if comm.rank == turn % (comm.size + 1) else 0
            x, idx = np.full((n, 8), turn, np.float32), np.full((n, 2), turn % 3)
            recv_x, handle = ep.dispatch(x, idx)
            combined = ep.combine(recv_x, handle)
            np.testing.assert_array_equal(combined, 2 * x)


@ranks(1, 3)
def test_a_group_that_may_not_send_at_all(comm: xccl.Communicator) -> None:
    with Layer(comm.size, 2, 5, 1, 0, DTYPES[2], "int8", None).open(comm) as ep:
        for _ in range(5):
            recv_x, handle = ep.dispatch(np.zeros((0, 5), DTYPES[2]), np.zeros((0, 1), np.int64))
            assert recv_x.shape == ep.combine(recv_x, handle).shape == (0, 5)


@ranks(4, 6)
def test_sub_communicators_do_not_mix(comm: xccl.Communicator) -> None:
    """Two halves work at their own pace on groups of their own, beside a group of all."""
    part = comm.split(comm.rank % 2)
    rng, own = np.random.default_rng(7), np.random.default_rng((8, comm.rank % 2))
    everyone, half = random_layer(rng, comm.size), random_layer(own, part.size)
    heap = comm.zeros(1 << 16, np.uint8)
    with everyone.open(comm) as all_ep, half.open(part) as part_ep:
        for _ in range(4):
            for _ in range(int(own.integers(1, 5))):
                one_round(part, part_ep, random_batch(own, half), own, heap)
            one_round(comm, all_ep, random_batch(rng, everyone), rng, heap)
    part.close()


@ranks(2)
def test_two_groups_on_one_communicator_interleave(comm: xccl.Communicator) -> None:
    rng = np.random.default_rng(9)
    rank = comm.rank
    layers = [random_layer(rng, 2) for _ in range(2)]
    with layers[0].open(comm) as first, layers[1].open(comm) as second:
        for _ in range(10):
            a, b = (random_batch(rng, layer) for layer in layers)
            hook = first.dispatch_async(a.xs[rank], a.idxs[rank])
            recv_b, handle_b = second.dispatch(b.xs[rank], b.idxs[rank])
            recv_a, handle_a = hook()
            check_received(a, rank, recv_a, handle_a)
            check_received(b, rank, recv_b, handle_b)
            hook = first.combine_async(a.ys[rank], handle_a)
            assert_same_numbers(second.combine(b.ys[rank], handle_b), b.outs(False)[rank])
            assert_same_numbers(hook(), a.outs(False)[rank])


@pytest.mark.parametrize("simd", ["scalar", "avx2", "avx512", "auto"])
def test_every_vector_width_gives_the_same(simd: str) -> None:
    def body(comm: xccl.Communicator) -> None:
        xccl.rc.simd = simd
        try:
            several_layers(comm, 11, num_layers=4)
        except xccl.XcclUsageError as error:
            assert "vector instructions" in str(error)  # this processor lacks them  # noqa: PT017

    xccl.run(body, 2, timeout=60)
