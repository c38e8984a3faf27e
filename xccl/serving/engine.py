"""The engine of one rank: a step plans, runs the model, samples and speculates; all ranks step together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from xccl.serving.arrays import FloatArray, IntArray
from xccl.serving.batch import StepBatch, build_batch
from xccl.serving.kv_cache import PagedKVCache, blocks_for
from xccl.serving.model import MoEModel
from xccl.serving.request import FinishReason, Request
from xccl.serving.running import RunningRequests
from xccl.serving.sampling import SamplingBatch, sample
from xccl.serving.scheduler import Scheduler, StepPlan
from xccl.serving.speculation import Speculator, VerifiedStep

PREFILL_ROWS = 256


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of one rank's engine.

    ``num_slots``: concurrent requests. ``kv_blocks`` bounds the KV cache (None: enough for every slot at full
    context). ``prefill_rows``: prompt tokens a step. ``mtp``: speculative decoding.
    """

    num_slots: int
    mtp: bool = True
    kv_blocks: int | None = None
    prefill_rows: int = PREFILL_ROWS


@dataclass(frozen=True)
class StepNews:
    """What one step brought to this rank's requests.

    ``request_ids`` and ``tokens`` belong together, in order of generation: a request may have two. ``ended`` names
    the requests that have all their tokens, and why.
    """

    request_ids: list[int]
    tokens: IntArray
    ended: list[tuple[int, FinishReason]]


@dataclass(frozen=True)
class Occupancy:
    """How full a rank is: requests that wait, requests in slots, KV blocks that they hold."""

    waiting: int
    running: int
    kv_blocks: int


class Engine:
    """Serves this rank's requests; the experts of its model may be on any rank."""

    def __init__(self, model: MoEModel, options: EngineOptions) -> None:
        config = model.config
        slots = options.num_slots
        self.num_slots = slots
        self.num_blocks = max(
            1, slots * blocks_for(config.max_context) if options.kv_blocks is None else options.kv_blocks
        )
        self._model = model
        self._cache = PagedKVCache(model.num_cache_layers, slots, config.max_context, config.kv_width, self.num_blocks)
        self._running = RunningRequests(slots, config.max_context, config.eot_token)
        self._scheduler = Scheduler(self._cache, self._running, slots, config.max_context, options.prefill_rows)
        self._speculator = Speculator(model, self._cache, self._running) if options.mtp else None
        self.drafted = 0
        self.accepted = 0

    @property
    def row_stable(self) -> bool:
        """Whether a row of a product has the same bits in any batch, so that texts cannot depend on it."""
        return self._model.gemm.row_stable

    @property
    def num_unfinished(self) -> int:
        """Requests of this rank that wait or run."""
        return self._scheduler.num_unfinished

    @property
    def occupancy(self) -> Occupancy:
        """How full this rank is now."""
        running = len(self._scheduler.requests)
        held = self.num_blocks - self._cache.allocator.num_free
        return Occupancy(self._scheduler.num_unfinished - running, running, held)

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests for the next steps. Raises ValueError for one that could never run."""
        self._scheduler.add(requests)

    def cancel(self, request_id: int) -> None:
        """Forget a request and free what it holds. One that has ended is no error: the two may cross."""
        self._scheduler.cancel(request_id)

    def step(self) -> StepNews:
        """One step of all ranks. Collective, also for a rank that has nothing to compute."""
        plan = self._scheduler.plan()
        draft_slots = plan.decode_slots[plan.verify]
        length = self._running.length
        batch = build_batch(
            self._cache,
            plan.chunks,
            plan.decode_slots,
            length[plan.decode_slots] - 1,
            draft_slots,
            length[draft_slots],
        )
        tokens = self._running.tokens[batch.slots, batch.positions]
        tokens[batch.num_rows - len(draft_slots) :] = self._running.draft[draft_slots]
        x = self._model.forward(tokens, batch, self._cache)
        slots, new_tokens, verified = self._choose(plan, batch, x)
        request_ids = [self._scheduler.requests[slot].request_id for slot in slots.tolist()]
        news = StepNews(request_ids, new_tokens, [self._close(slot) for slot in verified.ended])
        if self._speculator is not None:
            self._speculator(x, verified)
        return news

    def _choose(self, plan: StepPlan, batch: StepBatch, x: FloatArray) -> tuple[IntArray, IntArray, VerifiedStep]:
        """Sample, verify the drafts and append; returns (slots, tokens) in order and what goes on."""
        running = self._running
        completed, prompt_rows = self._completed_prompts(batch)
        slots = np.concatenate([completed, plan.decode_slots])
        first_decode = batch.num_prefill_rows
        rows = np.concatenate([prompt_rows, np.arange(first_decode, batch.num_rows)])
        of_draft = len(completed) + np.flatnonzero(plan.verify)
        draft_slots = slots[of_draft]
        params = running.sampling_batch(
            np.concatenate([slots, draft_slots]),
            np.concatenate([running.length[slots], running.length[draft_slots] + 1]),
        )
        chosen = self._sample(x[rows], params)
        first, second = chosen[: len(slots)], chosen[len(slots) :]
        guessed = first[of_draft] == running.draft[draft_slots]
        self.drafted += len(guessed)
        self.accepted += int(guessed.sum())
        running.append(slots, first)
        ended = running.ended(slots)
        accepted = guessed & ~ended[of_draft]
        running.append(draft_slots[accepted], second[accepted])
        ended[of_draft[accepted]] = running.ended(draft_slots[accepted])
        verified = VerifiedStep(
            batch=batch,
            decode_slots=plan.decode_slots,
            kept_decode=~ended[len(completed) :],
            draft_slots=draft_slots,
            kept_draft=accepted & ~ended[of_draft],
            ended=frozenset(slots[ended].tolist()),
        )
        news = np.concatenate([slots, draft_slots[accepted]])
        return news, np.concatenate([first, second[accepted]]), verified

    def _completed_prompts(self, batch: StepBatch) -> tuple[IntArray, IntArray]:
        """Slots whose last prompt chunk is in the batch, and the row of their last prompt token."""
        ends = np.cumsum([chunk.size for chunk in batch.chunks], dtype=np.int64) - 1
        slots = np.array([chunk.slot for chunk in batch.chunks], np.int64)
        complete = np.array([chunk.stop for chunk in batch.chunks], np.int64) == self._running.prompt_length[slots]
        return slots[complete], ends[complete]

    def _sample(self, x: FloatArray, params: SamplingBatch) -> IntArray:
        if not len(x):
            return np.empty(0, np.int64)
        return sample(self._model.logits(x), params)

    def _close(self, slot: int) -> tuple[int, FinishReason]:
        """Free the slot of a request that has ended."""
        reason = self._running.finish_reason(slot)
        return self._scheduler.finish(slot).request_id, reason
