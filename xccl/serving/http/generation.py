"""One request of a client on its way: tokens of its choices come in, pieces of text go out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Literal

from xccl.serving.http.errors import ApiError
from xccl.serving.http.limits import Job
from xccl.serving.http.pool import RankPool
from xccl.serving.http.stops import StopScanner
from xccl.serving.request import FinishReason
from xccl.serving.tokenizer import TextStream, Tokenizer

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """More text of one choice; ``finish_reason`` with the last piece of it."""

    index: int
    text: str
    finish_reason: Finish | None


@dataclass(frozen=True)
class Timing:
    """Seconds from the request to a choice's first token, and mean seconds of each later one if there is one."""

    first_token: float
    per_token: float | None


class Generation:
    """Runs a job. Iterate over :meth:`pieces`, and call :meth:`close` whatever happens: it frees what still runs.

    ``on_end`` is called with the timing of every choice that ends by itself.
    """

    def __init__(
        self, pool: RankPool, job: Job, tokenizer: Tokenizer, on_end: Callable[[Finish, Timing], None]
    ) -> None:
        self._pool = pool
        self._on_end = on_end
        self._news: asyncio.Queue[_News] = asyncio.Queue()
        self._started = time.perf_counter()
        self._choices = [_Choice(index, tokenizer, job.stops, self._news) for index in range(len(job.prompts))]
        self._cancel = pool.submit(job.prompts, job.sampling, self._choices)

    @property
    def num_tokens(self) -> int:
        """Tokens generated for all choices, up to the one that completes a stop string."""
        return sum(choice.num_tokens for choice in self._choices)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The texts as they grow. Raises ApiError if the server ends first."""
        unfinished = len(self._choices)
        while unfinished:
            news = await self._news.get()
            if news.error is not None:
                raise news.error
            choice = self._choices[news.index]
            if choice.finish is not None:
                continue  # came while the rank was told to stop
            text = choice.take(news)
            if choice.finish is not None:
                unfinished -= 1
                self._cancel[news.index]()
                self._note_end(choice, choice.finish)
            if text or choice.finish is not None:
                yield Piece(news.index, text, choice.finish)

    def close(self) -> bool:
        """Free the slots of choices that have not ended; True if there were any."""
        unfinished = [choice for choice in self._choices if choice.finish is None]
        for choice in unfinished:
            self._cancel[choice.index]()
        return bool(unfinished)

    def _note_end(self, choice: _Choice, finish: Finish) -> None:
        self._pool.note_duration(choice.last_token - self._started)
        later = choice.num_tokens - 1
        per_token = (choice.last_token - choice.first_token) / later if later else None
        self._on_end(finish, Timing(choice.first_token - self._started, per_token))


@dataclass(frozen=True)
class _News:
    index: int
    tokens: list[int]
    reason: FinishReason | None
    error: ApiError | None
    time: float


class _Choice:
    """One text: receives tokens from the pool, turns them into text for the client."""

    def __init__(self, index: int, tokenizer: Tokenizer, stops: tuple[str, ...], news: asyncio.Queue[_News]) -> None:
        self.index = index
        self.num_tokens = 0
        self.finish: Finish | None = None
        self.first_token = 0.0
        self.last_token = 0.0
        self._stream = TextStream(tokenizer)
        self._scanner = StopScanner(stops)
        self._news = news

    def tokens(self, tokens: list[int], reason: FinishReason | None) -> None:
        """Tokens from the rank."""
        self._news.put_nowait(_News(self.index, tokens, reason, None, time.perf_counter()))

    def failed(self, error: ApiError) -> None:
        """The server ends."""
        self._news.put_nowait(_News(self.index, [], None, error, time.perf_counter()))

    def take(self, news: _News) -> str:
        """Text that these tokens complete; sets ``finish`` with the last of it."""
        self.first_token = self.first_token or news.time
        self.last_token = news.time
        text = ""
        for token in news.tokens:
            self.num_tokens += 1
            text += self._scanner.push(self._stream.push(token))
            if self._scanner.stopped:
                self.finish = "stop"
                return text
        if news.reason is not None:
            text += self._scanner.push(self._stream.flush())
            self.finish = "stop" if news.reason == "stop" or self._scanner.stopped else "length"
            text += self._scanner.flush()
        return text
