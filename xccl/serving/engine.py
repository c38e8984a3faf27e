"""The serving loop of one rank: plan, forward, sample, speculate, exchange; all ranks step together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from xccl.serving.arrays import FloatArray, IntArray
from xccl.serving.batch import StepBatch, build_batch
from xccl.serving.exchange import StepExchange, StepReport
from xccl.serving.kv_cache import PagedKVCache, blocks_for
from xccl.serving.model import MoEModel
from xccl.serving.request import Request, RequestOutput
from xccl.serving.running import RunningRequests
from xccl.serving.sampling import SamplingBatch, sample
from xccl.serving.scheduler import Scheduler, StepPlan
from xccl.serving.speculation import Speculator, VerifiedStep
from xccl.serving.statistics import MeasuredTransport, RankResult

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


class Engine:
    """Serves this rank's requests; the experts of its model may be on any rank.

    ``on_report`` is called with the report of every step (all ranks' new tokens).
    """

    def __init__(
        self,
        model: MoEModel,
        transport: MeasuredTransport,
        exchange: StepExchange,
        options: EngineOptions,
        on_report: Callable[[StepReport], None] | None = None,
    ) -> None:
        config = model.config
        slots = options.num_slots
        blocks = options.kv_blocks if options.kv_blocks is not None else slots * blocks_for(config.max_context)
        self._model = model
        self._transport = transport
        self._exchange = exchange
        self._on_report = on_report
        layers = model.num_cache_layers
        self._cache = PagedKVCache(layers, slots, config.max_context, config.kv_width, max(blocks, 1))
        self._running = RunningRequests(slots, config.max_context, config.eot_token)
        self._scheduler = Scheduler(self._cache, self._running, slots, config.max_context, options.prefill_rows)
        self._speculator = Speculator(model, self._cache, self._running) if options.mtp else None
        self._outputs: dict[int, RequestOutput] = {}
        self._start = 0.0
        self._drafted = 0
        self._accepted = 0

    def run(self, requests: Sequence[Request]) -> RankResult:
        """Serve ``requests``, which all arrive now, to their ends. Collective: returns when all ranks are done."""
        self._scheduler.add(requests)
        self._outputs = {request.request_id: RequestOutput(request.request_id) for request in requests}
        self._start = time.perf_counter()
        steps = 0
        with np.errstate(over="ignore"):
            while self.step().num_unfinished:
                steps += 1
        return RankResult(
            outputs=list(self._outputs.values()),
            elapsed=time.perf_counter() - self._start,
            steps=steps + 1,
            drafted=self._drafted,
            accepted=self._accepted,
            row_stable=self._model.gemm.row_stable,
            dispatch_us=self._transport.dispatch_us,
            combine_us=self._transport.combine_us,
            recv_rows=self._transport.recv_rows,
            expert_load=self._transport.expert_load,
        )

    def step(self) -> StepReport:
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
        ids = [self._scheduler.requests[slot].request_id for slot in slots.tolist()]
        self._close(verified.ended)
        if self._speculator is not None:
            self._speculator(x, verified)
        report = self._exchange(self._scheduler.num_unfinished, ids, new_tokens)
        if self._on_report is not None:
            self._on_report(report)
        return report

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
        self._drafted += len(guessed)
        self._accepted += int(guessed.sum())
        running.append(slots, first)
        ended = running.ended(slots)
        accepted = guessed & ~ended[of_draft]
        running.append(draft_slots[accepted], second[accepted])
        ended[of_draft[accepted]] = running.ended(draft_slots[accepted])
        self._stamp(slots)
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

    def _stamp(self, slots: IntArray) -> None:
        """Note when the slots' newest tokens came."""
        now = time.perf_counter() - self._start
        for slot in slots.tolist():
            output = self._outputs[self._scheduler.requests[slot].request_id]
            output.last_token = now
            output.first_token = output.first_token or now

    def _close(self, ended: frozenset[int]) -> None:
        """Complete the outputs of ended requests and free their slots."""
        for slot in ended:
            output = self._outputs[self._scheduler.requests[slot].request_id]
            output.tokens = self._running.generated(slot)
            output.finish_reason = self._running.finish_reason(slot)
            self._scheduler.finish(slot)
