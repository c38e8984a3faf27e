"""The serving loop on several ranks: the same texts as one process, whoever owns what."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving.tiny_model import CONFIG

import xccl
from xccl.serving.check import first_difference
from xccl.serving.request import Request, SamplingParams
from xccl.serving.service import (
    ServiceOptions,
    requests_of_rank,
    serve_rank,
    serve_reference,
    slots_of_rank,
)
from xccl.serving.statistics import summarise


def make_requests(count, sampling, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Request(i, tuple(rng.integers(1, CONFIG["vocab_size"], rng.integers(1, 100)).tolist()), sampling)
        for i in range(count)
    ]


def serve(nranks, requests, options):
    return xccl.run(serve_rank, nranks, requests, options, timeout=60)


def assert_equals_reference(results, requests, options):
    outputs = [output for result in results for output in result.outputs]
    assert first_difference(outputs, serve_reference(requests, options).outputs) is None


GREEDY = SamplingParams(max_tokens=20)
SEEDED = SamplingParams(max_tokens=20, temperature=0.9, top_p=0.95, seed=11)


@pytest.mark.parametrize("nranks", [1, 2, 3, 4])
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("quant", [None, "int8"])
def test_any_number_of_ranks_gives_the_texts_of_one_process(tiny_model, nranks, sampling, quant):
    """Six experts on four ranks: uneven blocks."""
    requests = make_requests(7, sampling)
    options = ServiceOptions(tiny_model, batch=5, quant=quant)
    assert_equals_reference(serve(nranks, requests, options), requests, options)


@pytest.mark.parametrize("mtp", [False, True])
def test_ranks_without_requests_take_part(tiny_model, mtp):
    """One request and one slot: three of four ranks only run experts."""
    requests = make_requests(2, SEEDED)
    options = ServiceOptions(tiny_model, batch=1, mtp=mtp)
    results = serve(4, requests, options)
    assert [len(result.outputs) for result in results] == [2, 0, 0, 0]
    assert_equals_reference(results, requests, options)


def test_more_ranks_than_experts(tiny_model):
    requests = make_requests(8, SEEDED)
    options = ServiceOptions(tiny_model, batch=8)
    assert_equals_reference(serve(8, requests, options), requests, options)


def test_a_bounded_cache_only_delays(tiny_model):
    requests = make_requests(9, SEEDED)
    tight = ServiceOptions(tiny_model, batch=9, kv_blocks=8)
    assert_equals_reference(serve(2, requests, tight), requests, ServiceOptions(tiny_model, batch=9))


def test_every_rank_learns_of_every_token(tiny_model):
    requests = make_requests(5, SEEDED)
    options = ServiceOptions(tiny_model, batch=4)

    def rank(comm):
        streamed = {request.request_id: [] for request in requests}

        def take(report):
            for request_id, token in zip(report.request_ids.tolist(), report.tokens.tolist(), strict=True):
                streamed[request_id].append(token)

        return streamed, serve_rank(comm, requests, options, take)

    results = xccl.run(rank, 3, timeout=60)
    texts = {output.request_id: output.tokens for _, result in results for output in result.outputs}
    assert all(streamed == texts for streamed, _ in results)


def test_statistics_add_up(tiny_model):
    requests = make_requests(6, SEEDED)
    results = serve(2, requests, ServiceOptions(tiny_model, batch=6))
    dispatched = sum(result.expert_load.sum() for result in results)
    assert dispatched == sum(sum(result.recv_rows) for result in results)
    assert len({len(result.dispatch_us) for result in results}) == 1
    layers = CONFIG["num_layers"] - CONFIG["num_dense_layers"] + 1
    assert len(results[0].combine_us) == results[0].steps * layers
    summary = summarise(results)
    assert summary.requests == 6
    assert summary.tokens == sum(len(output.tokens) for result in results for output in result.outputs)
    assert summary.recv_imbalance >= 1
    assert summary.expert_imbalance >= 1
    assert 0 <= summary.mtp_acceptance <= 1


@given(batch=st.integers(1, 40), size=st.integers(1, 20), count=st.integers(0, 60))
def test_slots_and_requests_are_dealt_out_completely(batch, size, count):
    requests = make_requests(count, GREEDY)
    slots = [slots_of_rank(batch, rank, size) for rank in range(size)]
    owned = [requests_of_rank(requests, batch, rank, size) for rank in range(size)]
    assert sum(slots) == batch
    assert sorted(r.request_id for part in owned for r in part) == list(range(count))
    assert all(slots[rank] for rank in range(size) if owned[rank])
