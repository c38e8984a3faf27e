"""The ranks as the front sees them: which requests each one has, and where its tokens go."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from xccl.serving.http.errors import ApiError, overloaded, server_failed
from xccl.serving.link import Cancel, Link, RankInfo, RankStatus, Submit, Tokens, Wake
from xccl.serving.request import FinishReason, Request, SamplingParams

_LONGEST_RETRY_SECONDS = 60


class Receiver(Protocol):
    """Takes the tokens of one request. Called from the event loop, must not wait."""

    def tokens(self, tokens: list[int], reason: FinishReason | None) -> None:
        """New tokens; ``reason`` with the last ones."""

    def failed(self, error: ApiError) -> None:
        """There will be no more tokens."""


@dataclass
class RankView:
    """One rank: what it said of itself, and the requests that it was given and that have not ended."""

    link: Link
    info: RankInfo | None = None
    status: RankStatus | None = None
    receivers: dict[int, Receiver] = field(default_factory=dict)

    @property
    def load(self) -> float:
        """Unfinished requests a slot."""
        return len(self.receivers) / self.info.slots if self.info is not None and self.info.slots else float("inf")


class RankPool:
    """Gives requests to ranks and hands on what they generate; belongs to one event loop.

    At most ``queue`` requests wait beyond those that the ranks' slots hold.
    """

    def __init__(self, links: Sequence[Link], queue: int) -> None:
        self.ranks = [RankView(link) for link in links]
        self.queue = queue
        self.num_generated = 0  # tokens since the start, whoever wants them
        self._ids = itertools.count()
        self._submitted = 0
        self._ended: ApiError | None = None
        self._ready = asyncio.Event()
        self._mean_seconds = 1.0

    @property
    def num_slots(self) -> int:
        """Requests that can run at a time on all ranks."""
        return sum(rank.info.slots for rank in self.ranks if rank.info is not None)

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return sum(len(rank.receivers) for rank in self.ranks)

    @property
    def failure(self) -> ApiError | None:
        """Why no more requests are taken, if none are."""
        return self._ended

    async def start(self) -> None:
        """Listen to the ranks; returns when all are ready."""
        loop = asyncio.get_running_loop()
        for rank in self.ranks:
            loop.add_reader(rank.link, self._take, rank)
        await self._ready.wait()

    def submit(
        self, prompts: Sequence[tuple[int, ...]], sampling: SamplingParams, receivers: Sequence[Receiver]
    ) -> list[Callable[[], None]]:
        """Start one request a prompt; returns what cancels each.

        The i-th request's noise is keyed by i, so its text depends on nothing else that runs. Raises ApiError if
        the queue has no room for all of them.
        """
        if self._ended is not None:
            raise self._ended
        room = self.num_slots + self.queue
        if len(prompts) > room:
            raise ApiError(f"{len(prompts)} texts are too many for one request: {room} fit into the server", param="n")
        if self.num_unfinished + len(prompts) > room:
            raise overloaded(self.num_unfinished - self.num_slots, self._retry_after())
        return [
            self._start(Request(next(self._ids), prompt, sampling, noise_id=number), receiver)
            for number, (prompt, receiver) in enumerate(zip(prompts, receivers, strict=True))
        ]

    def note_duration(self, seconds: float) -> None:
        """A request took so long: the estimate for those who are sent away follows."""
        self._mean_seconds += 0.1 * (seconds - self._mean_seconds)

    def end(self, reason: str) -> None:
        """Tell everybody who waits that the server ends, and take nothing more."""
        self._ended = server_failed(reason)
        for rank in self.ranks:
            for receiver in list(rank.receivers.values()):
                receiver.failed(self._ended)
            rank.receivers.clear()

    def close(self) -> None:
        """Let go of the ranks' sockets."""
        loop = asyncio.get_running_loop()
        for rank in self.ranks:
            self._forget(loop, rank)
            rank.link.close()

    def _retry_after(self) -> int:
        """Seconds in which about as many requests end as are in the queue."""
        rounds = max(1.0, self.queue / max(self.num_slots, 1))
        return int(min(max(1.0, self._mean_seconds * rounds), _LONGEST_RETRY_SECONDS))

    def _start(self, request: Request, receiver: Receiver) -> Callable[[], None]:
        chosen = min(self.ranks, key=lambda rank: rank.load)
        chosen.receivers[request.request_id] = receiver
        self._submitted += 1
        for rank in self.ranks:
            self._send(rank, Submit(request, self._submitted) if rank is chosen else Wake(self._submitted))
        return lambda: self._cancel(chosen, request.request_id)

    def _cancel(self, rank: RankView, request_id: int) -> None:
        if rank.receivers.pop(request_id, None) is not None:
            self._send(rank, Cancel(request_id))

    def _send(self, rank: RankView, message: Any) -> None:
        rank.link.send(message)
        if rank.link.has_backlog:
            loop = asyncio.get_running_loop()
            loop.add_writer(rank.link, self._flush, loop, rank)

    def _flush(self, loop: asyncio.AbstractEventLoop, rank: RankView) -> None:
        rank.link.flush()
        if not rank.link.has_backlog:
            loop.remove_writer(rank.link)

    def _take(self, rank: RankView) -> None:
        """Hand on what a rank has sent."""
        try:
            messages = rank.link.receive()
        except EOFError:
            # the launcher says why; until then nothing comes from this rank
            self._forget(asyncio.get_running_loop(), rank)
            return
        for message in messages:
            if isinstance(message, Tokens):
                self._hand_on(rank, message)
            elif isinstance(message, RankStatus):
                rank.status = message
            else:
                rank.info = message
                if all(each.info is not None for each in self.ranks):
                    self._ready.set()

    def _hand_on(self, rank: RankView, news: Tokens) -> None:
        self.num_generated += len(news.tokens)
        reasons = dict(news.ended)
        tokens: dict[int, list[int]] = {}
        for request_id, token in zip(news.request_ids, news.tokens, strict=True):
            tokens.setdefault(request_id, []).append(token)
        for request_id, new in tokens.items():
            receiver = rank.receivers.get(request_id)
            if receiver is None:
                continue  # cancelled while they were on their way
            reason = reasons.get(request_id)
            if reason is not None:
                del rank.receivers[request_id]
            receiver.tokens(new, reason)

    @staticmethod
    def _forget(loop: asyncio.AbstractEventLoop, rank: RankView) -> None:
        loop.remove_reader(rank.link)
        loop.remove_writer(rank.link)
