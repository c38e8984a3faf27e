"""Continuous batching on one rank: who runs, which prompt chunks and tokens go into the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from xccl.serving.arrays import BoolArray, IntArray
from xccl.serving.batch import PREFILL_CHUNK, PrefillChunk
from xccl.serving.kv_cache import PagedKVCache, blocks_for
from xccl.serving.request import Request
from xccl.serving.running import RunningRequests, length_limit


@dataclass(frozen=True)
class StepPlan:
    """Work of one step: prompt chunks, slots that decode one token, and which of them also verify a draft."""

    chunks: tuple[PrefillChunk, ...]
    decode_slots: IntArray
    verify: BoolArray


class Scheduler:
    """Admits waiting requests while slots and KV blocks last, in order of arrival, and plans steps.

    A step takes at most ``prefill_rows`` prompt tokens (whole chunks, at least one chunk) and all decoding slots.
    Blocks for a request's longest possible text are reserved at admission, so no running request is ever evicted.
    """

    def __init__(
        self, cache: PagedKVCache, running: RunningRequests, num_slots: int, max_context: int, prefill_rows: int
    ) -> None:
        self._cache = cache
        self._running = running
        self._max_context = max_context
        self._prefill_rows = max(prefill_rows, PREFILL_CHUNK)
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._waiting: deque[Request] = deque()
        self._prefilling: deque[int] = deque()
        self.requests: dict[int, Request] = {}

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._waiting) + len(self.requests)

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests. Raises ValueError for one that could never run."""
        for request in requests:
            count = len(request.prompt_tokens)
            if not 1 <= count < self._max_context:
                raise ValueError(
                    f"request {request.request_id}: the prompt has {count} tokens, the model takes 1 to "
                    f"{self._max_context - 1}"
                )
            needed = blocks_for(length_limit(request, self._max_context))
            if needed > self._cache.allocator.num_blocks:
                raise ValueError(
                    f"request {request.request_id} needs {needed} KV blocks, the cache has "
                    f"{self._cache.allocator.num_blocks}: give it more blocks or lower max_tokens"
                )
            self._waiting.append(request)

    def plan(self) -> StepPlan:
        """Admit what fits and choose the rows of the next step; an idle rank gets an empty plan."""
        self._admit()
        decode_slots = self._running.decoding()
        return StepPlan(self._take_chunks(), decode_slots, self._running.verifiable(decode_slots))

    def finish(self, slot: int) -> Request:
        """Free the slot and blocks of a request."""
        self._running.stop(slot)
        self._cache.release(slot)
        self._free_slots.append(slot)
        return self.requests.pop(slot)

    def cancel(self, request_id: int) -> bool:
        """Forget a request that waits or runs, between two steps; False if it is neither (it may have ended)."""
        for slot, request in self.requests.items():
            if request.request_id == request_id:
                if slot in self._prefilling:
                    self._prefilling.remove(slot)
                self.finish(slot)
                return True
        for request in self._waiting:
            if request.request_id == request_id:
                self._waiting.remove(request)
                return True
        return False

    def _admit(self) -> None:
        while self._waiting and self._free_slots:
            request = self._waiting[0]
            slot = self._free_slots[-1]
            if not self._cache.reserve(slot, length_limit(request, self._max_context)):
                return
            self._waiting.popleft()
            self._free_slots.pop()
            self.requests[slot] = request
            self._running.start(slot, request)
            self._prefilling.append(slot)

    def _take_chunks(self) -> tuple[PrefillChunk, ...]:
        chunks: list[PrefillChunk] = []
        rows = 0
        while self._prefilling:
            slot = self._prefilling[0]
            start = int(self._running.computed[slot])
            chunk = PrefillChunk(slot, start, min(start + PREFILL_CHUNK, int(self._running.prompt_length[slot])))
            if rows + chunk.size > self._prefill_rows:
                break
            chunks.append(chunk)
            rows += chunk.size
            self._running.computed[slot] = chunk.stop
            if chunk.stop == self._running.prompt_length[slot]:
                self._prefilling.popleft()
        return tuple(chunks)


def max_step_rows(num_slots: int, prefill_rows: int) -> int:
    """Most rows that a step of one rank can have: every slot with a draft, and the prompt chunks."""
    return 2 * num_slots + max(prefill_rows, PREFILL_CHUNK)
