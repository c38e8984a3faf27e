"""A request, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    ``temperature`` 0 is greedy. ``top_p`` keeps the smallest set of most probable tokens whose probabilities sum to
    at least this. ``seed`` keys the noise. Raises ValueError for values out of range.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a number from 0 up, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")


@dataclass(frozen=True)
class Request:
    """A prompt with its id, which is unique among unfinished requests.

    ``noise_id`` takes part in the key of the noise, so equal prompts with equal seeds get different texts; None is
    the request's id. A server whose ids depend on what others ask names it, and the text does not depend on them.
    """

    request_id: int
    prompt_tokens: tuple[int, ...]
    sampling: SamplingParams
    noise_id: int | None = None


@dataclass
class RequestOutput:
    """Generated tokens of a request (an end-of-text token included) and when they came.

    Times are seconds of ``time.perf_counter`` since the engine started. ``finish_reason`` is "stop" (end of text),
    "length" (max_tokens) or "context" (the model's context is full).
    """

    request_id: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    arrival: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0

    @property
    def time_to_first_token(self) -> float:
        """Seconds from arrival to the first token."""
        return self.first_token - self.arrival

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds between tokens after the first; None if there is only one token."""
        if len(self.tokens) < 2:
            return None
        return (self.last_token - self.first_token) / (len(self.tokens) - 1)
