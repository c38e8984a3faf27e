"""Speculative decoding with the MTP module: which rows feed it, and the drafts it proposes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xccl.serving.arrays import BoolArray, FloatArray, IntArray
from xccl.serving.batch import PrefillChunk, StepBatch, build_batch
from xccl.serving.kv_cache import PagedKVCache
from xccl.serving.model import MoEModel
from xccl.serving.running import RunningRequests
from xccl.serving.sampling import sample


@dataclass(frozen=True)
class VerifiedStep:
    """What became of a step's rows after sampling.

    completed: slots whose last prompt chunk was in the step. decode_slots with kept_decode, and draft_slots with
    kept_draft: the masks say which rows carry on (the request goes on; for a draft row also: it was right).
    ended: slots whose request ended in this step.
    """

    batch: StepBatch
    decode_slots: IntArray
    kept_decode: BoolArray
    draft_slots: IntArray
    kept_draft: BoolArray
    ended: frozenset[int]


class Speculator:
    """Runs the MTP block behind the model so that its own KV is complete, and leaves one draft a running slot.

    Row i of the block takes the model's output at position i and the token at i + 1, and predicts the token at
    i + 2. Its noise is that of the position it predicts, the same that the verification will use.
    """

    def __init__(self, model: MoEModel, cache: PagedKVCache, running: RunningRequests) -> None:
        self._model = model
        self._cache = cache
        self._running = running

    def __call__(self, x: FloatArray, step: VerifiedStep) -> None:
        """Compute MTP rows for the accepted rows of x [rows, hidden] and store the drafts. Collective."""
        batch, source, last_rows, slots = self._layout(step)
        next_tokens = self._running.tokens[batch.slots, batch.positions + 1]
        y = self._model.mtp_forward(x[source], next_tokens, batch, self._cache)
        if len(slots):
            params = self._running.sampling_batch(slots, self._running.length[slots])
            self._running.draft[slots] = sample(self._model.mtp_logits(y[last_rows]), params)

    def _layout(self, step: VerifiedStep) -> tuple[StepBatch, IntArray, IntArray, IntArray]:
        """The MTP batch, its rows in the model's batch, and the last MTP row of each slot that gets a draft."""
        chunks, chunk_source = _continuing_chunks(step.batch.chunks, step.ended)
        num_prefill = step.batch.num_prefill_rows
        num_decode = len(step.decode_slots)
        decode_rows = num_prefill + np.flatnonzero(step.kept_decode)
        draft_rows = num_prefill + num_decode + np.flatnonzero(step.kept_draft)
        decode_slots = step.decode_slots[step.kept_decode]
        draft_slots = step.draft_slots[step.kept_draft]
        positions = step.batch.positions
        batch = build_batch(
            self._cache, chunks, decode_slots, positions[decode_rows], draft_slots, positions[draft_rows]
        )
        first_decode = len(chunk_source)
        last_of_decode = first_decode + np.arange(len(decode_slots))
        last_of_decode[np.searchsorted(decode_slots, draft_slots)] = (
            first_decode + len(decode_slots) + np.arange(len(draft_slots))
        )
        prompt_ends = np.cumsum([chunk.size for chunk in chunks], dtype=np.int64) - 1
        complete = [chunk.stop == self._running.prompt_length[chunk.slot] for chunk in chunks]
        completed_slots = [chunk.slot for chunk, done in zip(chunks, complete, strict=True) if done]
        source = np.concatenate([chunk_source, decode_rows, draft_rows])
        last_rows = np.concatenate([prompt_ends[np.array(complete, np.bool_)], last_of_decode])
        slots = np.concatenate([np.array(completed_slots, np.int64), decode_slots])
        return batch, source, last_rows, slots


def _continuing_chunks(chunks: Sequence[PrefillChunk], ended: frozenset[int]) -> tuple[list[PrefillChunk], IntArray]:
    """Chunks whose request goes on, and the rows they have in the step's batch."""
    kept = []
    rows = [np.empty(0, np.int64)]
    start = 0
    for chunk in chunks:
        if chunk.slot not in ended:
            kept.append(chunk)
            rows.append(np.arange(start, start + chunk.size))
        start += chunk.size
    return kept, np.concatenate(rows)
