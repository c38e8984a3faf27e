"""What clients may send: every wrong value is refused by its parameter's name, and nothing else happens."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving.tiny_model import CONFIG

from xccl.serving.config import ModelConfig
from xccl.serving.http.chat import render
from xccl.serving.http.errors import ApiError
from xccl.serving.http.limits import Limits
from xccl.serving.http.schema import ChatRequest, CompletionRequest, parse
from xccl.serving.tokenizer import Tokenizer

MAX_CONTEXT = CONFIG["max_context"]


@pytest.fixture(scope="module")
def limits(tiny_model):
    config = ModelConfig.load(tiny_model / "config.json")
    return Limits("tiny", config, Tokenizer.load(tiny_model / "tokenizer.json", config.eot_token), None)


def completion(limits, **fields):
    body = {"model": "tiny", "prompt": "abc", **fields}
    return limits.completion(parse(CompletionRequest, json.dumps(body).encode()))


def chat(limits, **fields):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "abc"}], **fields}
    return limits.chat(parse(ChatRequest, json.dumps(body).encode()))


WRONG = [
    ({"model": "other"}, "model", 404),
    ({"model": None}, "model", 400),
    ({"prompt": None}, "prompt", 400),
    ({"prompt": []}, "prompt", 400),
    ({"prompt": [[]]}, "prompt", 400),
    ({"prompt": [1, "a"]}, "prompt", 400),
    ({"prompt": [1.5]}, "prompt", 400),
    ({"prompt": [-1]}, "prompt", 400),
    ({"prompt": [True]}, "prompt", 400),
    ({"prompt": [CONFIG["vocab_size"]]}, "prompt", 400),
    ({"prompt": "x" * MAX_CONTEXT}, "prompt", 400),
    ({"prompt": "x" * 10**6}, "prompt", 400),
    ({"prompt": ["x", "y" * MAX_CONTEXT]}, "prompt", 400),
    ({"max_tokens": 0}, "max_tokens", 400),
    ({"max_tokens": 1.0}, "max_tokens", 400),
    ({"max_tokens": "3"}, "max_tokens", 400),
    ({"max_tokens": True}, "max_tokens", 400),
    ({"max_tokens": MAX_CONTEXT - 3}, "max_tokens", 400),
    ({"max_tokens": 10**30}, "max_tokens", 400),
    ({"temperature": -0.1}, "temperature", 400),
    ({"temperature": 2.1}, "temperature", 400),
    ({"temperature": "hot"}, "temperature", 400),
    ({"top_p": 0}, "top_p", 400),
    ({"top_p": 1.5}, "top_p", 400),
    ({"seed": -1}, "seed", 400),
    ({"seed": 2**63}, "seed", 400),
    ({"n": 0}, "n", 400),
    ({"n": 129}, "n", 400),
    ({"n": 65, "prompt": ["a", "b"]}, "n", 400),
    ({"stop": ""}, "stop", 400),
    ({"stop": ["a", ""]}, "stop", 400),
    ({"stop": list("abcde")}, "stop", 400),
    ({"stop": 5}, "stop", 400),
    ({"stream": "yes"}, "stream", 400),
    ({"stream_options": {"include_usage": True}}, "stream_options", 400),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options", 400),
    ({"echo": True}, "echo", 400),
    ({"best_of": 2}, "best_of", 400),
    ({"logprobs": 3}, "logprobs", 400),
    ({"suffix": "end"}, "suffix", 400),
    ({"presence_penalty": 0.5}, "presence_penalty", 400),
    ({"max_token": 5}, "max_token", 400),
    ({"messages": []}, "messages", 400),
]


@pytest.mark.parametrize(("fields", "param", "status"), WRONG, ids=[str(fields)[:40] for fields, _, _ in WRONG])
def test_a_wrong_parameter_is_named(limits, fields, param, status):
    with pytest.raises(ApiError) as refused:
        completion(limits, **fields)
    error = refused.value.body["error"]
    assert (refused.value.status, error["param"]) == (status, param)
    assert param in error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 300


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        ["hello"],
        [{"role": "user"}],
        [{"role": "nobody", "content": "a"}],
        [{"role": "tool", "content": "a"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": "x" * MAX_CONTEXT}],
        [{"role": "user", "content": "x", "extra": 1}],
    ],
    ids=str,
)
def test_wrong_messages_are_named(limits, messages):
    with pytest.raises(ApiError) as refused:
        chat(limits, messages=messages)
    assert refused.value.body["error"]["param"] == "messages"


def test_a_prompt_that_fills_the_context_is_too_long_by_its_code(limits):
    with pytest.raises(ApiError) as refused:
        completion(limits, prompt="x" * (MAX_CONTEXT - 1))
    assert refused.value.body["error"]["code"] == "context_length_exceeded"
    assert completion(limits, prompt="x" * (MAX_CONTEXT - 2), max_tokens=1).num_prompt_tokens == MAX_CONTEXT - 1


def test_a_small_cache_bounds_the_context(tiny_model, limits):
    config = ModelConfig.load(tiny_model / "config.json")
    small = Limits("tiny", config, limits.tokenizer, kv_blocks=2)
    assert completion(small, prompt="x" * 19, max_tokens=12).num_prompt_tokens == 20
    with pytest.raises(ApiError, match="room for 32 together"):
        completion(small, prompt="x" * 19, max_tokens=13)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": None, "top_p": None, "stop": None, "seed": None, "n": None, "max_tokens": None, "stream": None},
        {
            "echo": False,
            "best_of": 1,
            "logprobs": None,
            "suffix": None,
            "presence_penalty": 0,
            "frequency_penalty": 0.0,
        },
        {"user": "me", "metadata": {"a": "b"}, "store": False, "logit_bias": {}},
    ],
)
def test_values_that_change_nothing_are_accepted(limits, fields):
    job = completion(limits, **fields)
    assert job.sampling.temperature == 1.0
    assert (job.sampling.max_tokens, job.stops, job.stream, len(job.prompts)) == (16, (), False, 1)


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("", 1), ("abc", 1), (["abc"], 1), (["a", "b", "c"], 3), ([5, 6], 1), ([[5, 6], [7]], 2)],
    ids=str,
)
def test_forms_of_the_prompt(limits, prompt, count):
    job = completion(limits, prompt=prompt, n=2)
    assert len(job.prompts) == 2 * count
    assert job.prompts[0] == job.prompts[1]
    assert job.num_prompt_tokens * 2 == sum(map(len, job.prompts))


def test_text_and_its_tokens_are_the_same_prompt(limits):
    tokens = list(limits.tokenizer.encode("Gr\u00fc\u00df Gott"))
    assert completion(limits, prompt=tokens).prompts == completion(limits, prompt="Gr\u00fc\u00df Gott").prompts


def test_a_chat_is_a_scene_that_ends_with_the_assistants_turn(limits):
    assert render([("system", "Be wise."), ("user", "Hello "), ("assistant", "Hail."), ("user", "Go on")]) == (
        "Be wise.\n\nUSER.\nHello\n\nASSISTANT.\nHail.\n\nUSER.\nGo on\n\nASSISTANT.\n"
    )
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    job = chat(limits, messages=[{"role": "user", "content": parts}], stop=["X"])
    assert limits.tokenizer.decode(job.prompts[0]) == "USER.\nHello\n\nASSISTANT.\n"
    assert job.stops == ("X", "\n\n")
    assert job.sampling.max_tokens == MAX_CONTEXT - len(job.prompts[0])
    assert chat(limits, max_completion_tokens=7, max_tokens=9).sampling.max_tokens == 7


def test_seeds_are_kept_or_drawn(limits):
    assert completion(limits, seed=2**63 - 1).sampling.seed == 2**63 - 1
    assert completion(limits).sampling.seed != completion(limits).sampling.seed


NOT_JSON = [b"", b"{", b"nul", b'{"model": NaN}', b"\xff\xfe", b"[" * 10**5, b'{"a":"\\ud800"}', b"1" * 5000]


@pytest.mark.parametrize("body", [*NOT_JSON, b"[]", b"3", b'"text"', b"null"], ids=lambda body: str(body[:20]))
def test_a_body_that_is_no_json_object(body):
    with pytest.raises(ApiError, match="the body is"):
        parse(CompletionRequest, body)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([*CompletionRequest.model_fields, *ChatRequest.model_fields, "logprobs", "tools", "echo", ""])


@settings(max_examples=300, deadline=None)
@given(fields=st.dictionaries(NAMES, JSON_VALUES, max_size=4), kind=st.sampled_from(["completion", "chat"]))
def test_any_json_gives_a_job_or_a_refusal(limits, fields, kind):
    try:
        job = (completion if kind == "completion" else chat)(limits, **fields)
    except ApiError as refused:
        error = refused
    else:
        assert all(1 <= len(prompt) <= MAX_CONTEXT - job.sampling.max_tokens for prompt in job.prompts)
        return
    assert 400 <= error.status < 500
    assert error.body["error"]["message"]
    json.dumps(error.body).encode()


@settings(max_examples=300, deadline=None)
@given(body=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_refused_in_words(body):
    with pytest.raises(ApiError):
        parse(CompletionRequest, body)


def test_a_number_of_thousands_of_digits_is_refused(limits):
    for name in ("n", "seed", "temperature", "prompt"):
        body = b'{"model": "tiny", "prompt": "a", "%s": %s}' % (name.encode(), b"9" * 6000)
        with pytest.raises(ApiError):
            limits.completion(parse(CompletionRequest, body))


@pytest.mark.parametrize(
    "text", ["", "abc", "\u00e4" * 300, "\U0001f600" * 200, "<eot>" * 60], ids=lambda text: text[:5]
)
def test_no_text_has_fewer_tokens_than_the_longest_token_allows(limits, text):
    assert len(limits.tokenizer.encode(text)) >= len(text) / limits.tokenizer.longest_token
