"""The client that people use: the official package, which checks the answers by its own types."""

import openai
import pytest
from serving.http.server import Server

KEY = "secret"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What news?"}]


@pytest.fixture(scope="module")
def server(tiny_model):
    with Server(tiny_model, "-n", "2", "--batch", "2", "--queue", "2", "--api-key", KEY) as running:
        yield running


def connect(server, **options):
    return openai.OpenAI(**{"base_url": f"{server.url}/v1", "api_key": KEY, "max_retries": 0, **options})


@pytest.fixture
def client(server):
    with connect(server) as made:
        yield made


@pytest.fixture
def strict(server):
    """Raises for an answer that is not of the package's types."""
    with connect(server, _strict_response_validation=True) as made:
        yield made


def test_completions(server, client, strict):
    ask = {"model": server.model, "prompt": "abc", "max_tokens": 12, "seed": 5, "n": 2, "stop": ["zz"]}
    whole = strict.completions.create(**ask)
    assert whole.usage.completion_tokens <= 24
    texts = ["", ""]
    # not strict: by the types a chunk's finish_reason cannot be null, but it is, and so is OpenAI's
    for chunk in client.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert chunk.usage == whole.usage


def test_chat(server, strict):
    ask = {"model": server.model, "messages": CHAT, "max_completion_tokens": 12, "seed": 5, "temperature": 0.5}
    whole = strict.chat.completions.create(**ask)
    assert whole.choices[0].message.role == "assistant"
    chunks = list(strict.chat.completions.create(**ask, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_models(server, strict):
    assert [model.id for model in strict.models.list()] == [server.model]
    assert strict.models.retrieve(server.model).owned_by == "xccl"


def test_refusals_are_the_exceptions_that_programs_catch(server, client):
    def ask(client=client, **fields):
        return client.completions.create(**{"model": server.model, "prompt": "abc", "max_tokens": 3, **fields})

    with pytest.raises(openai.BadRequestError) as refused:
        ask(temperature=3)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as refused:
        ask(prompt="x" * 300)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        ask(model="other")
    with connect(server, api_key="wrong") as stranger, pytest.raises(openai.AuthenticationError):
        ask(stranger)
    with ask(n=4, max_tokens=250, stream=True) as held:
        next(iter(held))
        with pytest.raises(openai.RateLimitError):
            ask()
    # the stream was closed before its end
    server.wait_until_idle()


def test_a_client_that_retries_gets_in_when_there_is_room(server):
    with connect(server, max_retries=20) as patient:
        held = patient.completions.create(model=server.model, prompt="abc", n=4, max_tokens=100, stream=True)
        next(iter(held))
        held.close()
        assert patient.completions.create(model=server.model, prompt="abc", max_tokens=3).usage.completion_tokens
