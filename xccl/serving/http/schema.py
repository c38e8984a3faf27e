"""What clients may send: the parameters of OpenAI's completions and chat completions, as pydantic models.

Every refusal names the parameter. A parameter of OpenAI's API that is not supported is accepted at the value that
changes nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic_core
from pydantic import BaseModel, ConfigDict, Field

from xccl.serving.http.errors import ApiError

# what leaves the text as it is, in addition to null
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
}
# for OpenAI's own bookkeeping
_IGNORED = {"metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}

_MEANINGS = {
    "prompt": "expected a string, a list of strings, a list of token ids, or a list of such lists",
    "stop": "expected a string or a list of at most 4 strings, none of them empty",
}
_MAX_STOPS = 4

# how pydantic names the members of a message's content in the place of an error
_UNION_MEMBERS = ("str", "list[TextPart]")

_TokenId = Annotated[int, Field(ge=0)]
_Stop = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """``stream_options``."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Sampling(_Strict):
    """What both kinds of request have in common; None is "not given"."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    n: int | None = Field(None, ge=1)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=_MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Sampling):
    """Body of ``/v1/completions``."""

    prompt: (
        str
        | Annotated[list[_TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Annotated[list[_TokenId], Field(min_length=1)]], Field(min_length=1)]
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, as text or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Sampling):
    """Body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


_Request = TypeVar("_Request", bound=_Sampling)


def parse(kind: type[_Request], body: bytes) -> _Request:
    """The request in a body of JSON. Raises ApiError that names the parameter that is wrong."""
    try:
        fields = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError(f"the body is a JSON {type(fields).__name__}, expected an object")
    for name, neutral in _WITHOUT_EFFECT.items():
        value = fields.pop(name, None)
        if value is not None and value not in neutral:
            raise ApiError(f"{name} is not supported: leave it out, or set it to {neutral[0]!r}", param=name)
    try:
        request = kind.model_validate({name: value for name, value in fields.items() if name not in _IGNORED})
    except pydantic.ValidationError as error:
        raise _refusal(error) from None
    if request.stream_options is not None and not request.stream:
        raise ApiError("stream_options: only with stream true", param="stream_options")
    return request


def _refusal(error: pydantic.ValidationError) -> ApiError:
    """The first finding, in words that begin with the parameter's name."""
    finding = error.errors(include_url=False, include_context=False)[0]
    name = str(finding["loc"][0])
    if finding["type"] == "extra_forbidden":
        return ApiError(f"unknown parameter {'.'.join(map(str, finding['loc']))}", param=name)
    if finding["type"] == "missing":
        return ApiError(f"{'.'.join(map(str, finding['loc']))} is missing", param=name)
    if name in _MEANINGS:
        return ApiError(f"{name}: {_MEANINGS[name]}", param=name)
    where = ".".join(str(part) for part in finding["loc"] if part not in _UNION_MEMBERS)
    return ApiError(f"{where}: {finding['msg'].lower()}, got {_shortened(finding['input'])}", param=name)


def _shortened(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "a very long number"
    return text if len(text) <= 60 else text[:57] + "..."
