"""What the server can take of one request, and a checked request in the engine's terms."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from xccl.serving.config import ModelConfig
from xccl.serving.http.chat import END_OF_TURN, render
from xccl.serving.http.errors import ApiError
from xccl.serving.http.schema import ChatRequest, CompletionRequest
from xccl.serving.kv_cache import BLOCK_TOKENS
from xccl.serving.request import SamplingParams
from xccl.serving.tokenizer import Tokenizer

_DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI's
_MAX_CHOICES = 128


@dataclass(frozen=True)
class Job:
    """A checked request: the prompt of each choice, all sampled alike."""

    prompts: list[tuple[int, ...]]
    num_prompt_tokens: int
    sampling: SamplingParams
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool


class Limits:
    """Checks requests against the model's context and the KV cache of a rank."""

    def __init__(self, model: str, config: ModelConfig, tokenizer: Tokenizer, kv_blocks: int | None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = config.max_context
        if kv_blocks is not None:
            self.max_tokens = min(self.max_tokens, kv_blocks * BLOCK_TOKENS)
        self._vocab_size = config.vocab_size
        self._max_characters = self.max_tokens * tokenizer.longest_token

    def completion(self, request: CompletionRequest) -> Job:
        """A job of prompts times n choices, those of the first prompt first. Raises ApiError."""
        self.check_model(request.model)
        if len(request.prompts) * (request.n or 1) > _MAX_CHOICES:
            raise ApiError(f"n: at most {_MAX_CHOICES} texts in one request", param="n")
        prompts = [self._tokens(prompt, "prompt") for prompt in request.prompts]
        max_tokens = request.max_tokens
        if max_tokens is None:
            max_tokens = min(_DEFAULT_COMPLETION_TOKENS, self.max_tokens - max(map(len, prompts)))
        return self._job(request, prompts, max_tokens, request.stops, "max_tokens")

    def chat(self, request: ChatRequest) -> Job:
        """A job of n choices, each of which ends with the assistant's turn. Raises ApiError."""
        self.check_model(request.model)
        if (request.n or 1) > _MAX_CHOICES:
            raise ApiError(f"n: at most {_MAX_CHOICES} texts in one request", param="n")
        prompt = self._tokens(render([(message.role, message.text) for message in request.messages]), "messages")
        given = request.max_completion_tokens or request.max_tokens
        max_tokens = self.max_tokens - len(prompt) if given is None else given
        name = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
        return self._job(request, [prompt], max_tokens, (*request.stops, END_OF_TURN), name)

    def check_model(self, name: str) -> None:
        """Raises ApiError unless this is the model that is served."""
        if name != self.model:
            raise ApiError(
                f"there is no model {name!r} here, only {self.model!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def _tokens(self, prompt: str | list[int], param: str) -> tuple[int, ...]:
        """Tokens of a prompt that leaves room for one more."""
        if isinstance(prompt, str):
            # no token has more characters than the longest, so this needs no tokens to be known as too long
            if len(prompt) > self._max_characters:
                raise self._too_long(f"{len(prompt)} characters", param)
            tokens = self.tokenizer.encode(prompt)
        else:
            tokens = tuple(prompt)
            if max(tokens) >= self._vocab_size:
                raise ApiError(
                    f"{param}: token {max(tokens)} does not exist, there are {self._vocab_size}", param=param
                )
        if len(tokens) >= self.max_tokens:
            raise self._too_long(f"{len(tokens)} tokens", param)
        return tokens

    def _too_long(self, length: str, param: str) -> ApiError:
        return ApiError(
            f"{param}: {length} are too long, there is room for {self.max_tokens} tokens, one of them new",
            param=param,
            code="context_length_exceeded",
        )

    def _job(
        self,
        request: CompletionRequest | ChatRequest,
        prompts: list[tuple[int, ...]],
        max_tokens: int,
        stops: tuple[str, ...],
        param: str,
    ) -> Job:
        longest = max(map(len, prompts))
        if longest + max_tokens > self.max_tokens:
            raise ApiError(
                f"{param}: {max_tokens} new tokens after {longest} of the prompt are too many, there is room for "
                f"{self.max_tokens} together",
                param=param,
                code="context_length_exceeded",
            )
        sampling = SamplingParams(
            max_tokens,
            1.0 if request.temperature is None else request.temperature,
            1.0 if request.top_p is None else request.top_p,
            secrets.randbits(63) if request.seed is None else request.seed,
        )
        return Job(
            prompts=[prompt for prompt in prompts for _ in range(request.n or 1)],
            num_prompt_tokens=sum(map(len, prompts)),
            sampling=sampling,
            stops=stops,
            stream=bool(request.stream),
            include_usage=request.include_usage,
        )
