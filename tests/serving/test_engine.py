"""The serving loop in one process: texts do not depend on how they are batched."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from serving.tiny_model import CONFIG, PlainModel

from xccl.serving.request import Request, SamplingParams
from xccl.serving.service import ServiceOptions, serve_reference

MAX_CONTEXT = CONFIG["max_context"]


def make_requests(count, sampling, seed=0, longest=100):
    rng = np.random.default_rng(seed)
    return [
        Request(i, tuple(rng.integers(1, CONFIG["vocab_size"], rng.integers(1, longest)).tolist()), sampling)
        for i in range(count)
    ]


def serve(model, requests, **options):
    result = serve_reference(requests, ServiceOptions(model, **options))
    return {output.request_id: output for output in result.outputs}


def tokens(outputs):
    return {request_id: output.tokens for request_id, output in outputs.items()}


def test_greedy_text_is_that_of_the_plain_model(tiny_model):
    plain = PlainModel(tiny_model)
    requests = make_requests(3, SamplingParams(max_tokens=12))
    got = tokens(serve(tiny_model, requests, quant=None, batch=2))
    for request in requests:
        known = list(request.prompt_tokens)
        for _ in range(12):
            known.append(int(plain.logits(plain.forward(np.array(known)))[-1].argmax()))
            if known[-1] == CONFIG["eot_token"]:
                break
        assert got[request.request_id] == known[len(request.prompt_tokens) :]


SAMPLINGS = [
    SamplingParams(max_tokens=30),
    SamplingParams(max_tokens=30, temperature=0.8, seed=4),
    SamplingParams(max_tokens=30, temperature=1.2, top_p=0.8, seed=5),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "temperature", "top-p"])
@pytest.mark.parametrize("quant", [None, "int8"])
def test_batch_size_and_speculation_change_no_token(tiny_model, sampling, quant):
    requests = make_requests(9, sampling)
    expected = tokens(serve(tiny_model, requests, quant=quant, batch=1, mtp=False))
    for batch in (1, 4, 9):
        for mtp in (False, True):
            assert tokens(serve(tiny_model, requests, quant=quant, batch=batch, mtp=mtp)) == expected


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 12),
    batch=st.integers(1, 12),
    max_tokens=st.integers(1, 40),
    kv_blocks=st.integers(16, 60),
)
def test_any_batch_and_any_cache_give_the_same_texts(tiny_model, seed, count, batch, max_tokens, kv_blocks):
    requests = make_requests(count, SamplingParams(max_tokens, temperature=1.0, seed=seed), seed, longest=255)
    roomy = serve(tiny_model, requests, batch=count)
    tight = serve(tiny_model, requests, batch=batch, kv_blocks=kv_blocks)
    assert tokens(roomy) == tokens(tight)
    for request in requests:
        output = tight[request.request_id]
        room = MAX_CONTEXT - len(request.prompt_tokens)
        assert 1 <= len(output.tokens) <= min(max_tokens, room)
        assert CONFIG["eot_token"] not in output.tokens[:-1]
        if output.finish_reason == "stop":
            assert output.tokens[-1] == CONFIG["eot_token"]
        else:
            assert len(output.tokens) == min(max_tokens, room)
            assert output.finish_reason == ("context" if room < max_tokens else "length")


def test_equal_prompts_get_different_texts_and_seeds_matter(tiny_model):
    def texts(seed):
        sampling = SamplingParams(max_tokens=20, temperature=1.0, seed=seed)
        return tokens(serve(tiny_model, [Request(i, (5, 6, 7), sampling) for i in range(3)]))

    first = texts(1)
    assert first[0] != first[1] != first[2]
    assert texts(1) == first
    assert texts(2) != first


def test_drafts_share_the_noise_of_their_verification(tiny_model, tmp_path):
    """Equal logits everywhere: noise alone decides, so every draft is right, an end of text too."""
    tensors = load_file(tiny_model / "model.safetensors")
    tensors["head.weight"][:] = 0
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(tiny_model / "config.json", tmp_path)
    sampling = SamplingParams(max_tokens=40, temperature=1.0, seed=8)
    requests = [Request(i, (1, 2, 3), sampling) for i in range(60)]
    result = serve_reference(requests, ServiceOptions(tmp_path))
    assert result.drafted == result.accepted > 0
    ended_early = [output for output in result.outputs if output.finish_reason == "stop"]
    assert len(ended_early) > 4
    assert all(output.tokens.index(CONFIG["eot_token"]) == len(output.tokens) - 1 for output in ended_early)
    assert tokens(serve(tmp_path, requests, mtp=False)) == {o.request_id: o.tokens for o in result.outputs}


def test_reports_carry_every_token_in_order(tiny_model):
    requests = make_requests(7, SamplingParams(max_tokens=25, temperature=0.7, seed=2))
    streamed = {request.request_id: [] for request in requests}
    unfinished = []

    def take(report):
        unfinished.append(report.num_unfinished)
        for request_id, token in zip(report.request_ids, report.tokens, strict=True):
            streamed[int(request_id)].append(int(token))

    result = serve_reference(requests, ServiceOptions(tiny_model, batch=3), take)
    assert streamed == {output.request_id: output.tokens for output in result.outputs}
    assert unfinished[-1] == 0
    assert unfinished == sorted(unfinished, reverse=True)


def test_a_prompt_of_the_whole_context_is_refused(tiny_model):
    request = Request(0, (1,) * MAX_CONTEXT, SamplingParams())
    with pytest.raises(ValueError, match=f"the prompt has {MAX_CONTEXT} tokens"):
        serve(tiny_model, [request])


def test_a_request_that_can_never_fit_is_refused(tiny_model):
    request = Request(3, (1,) * 100, SamplingParams(max_tokens=100))
    with pytest.raises(ValueError, match="request 3 needs 13 KV blocks, the cache has 12"):
        serve(tiny_model, [request], kv_blocks=12)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("seed", -1),
    ],
)
def test_sampling_parameters_out_of_range(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})
