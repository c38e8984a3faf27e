"""What one rank computes in one step: prefill chunks and decode rows, as flat arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xccl.serving.arrays import FloatArray, IntArray
from xccl.serving.kv_cache import PagedKVCache

CONTEXT_STEP = 64
PREFILL_CHUNK = 64

_NO_ROWS: IntArray = np.empty(0, np.int64)


@dataclass(frozen=True)
class PrefillChunk:
    """Prompt positions [start, stop) of one slot; ``start`` is a multiple of PREFILL_CHUNK.

    The boundaries depend on the request alone, so its attention products have the same shape in any batch.
    """

    slot: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class DecodeGroup:
    """Decode rows that attend over the same fixed context length.

    rows [slots, r] are row numbers of the batch, r = 2 if some slot verifies a draft (a slot with one row then
    names it twice: both give the same bits). mask [slots, r, 1, context] is 0 or -inf.
    """

    slots: IntArray
    rows: IntArray
    context: int
    mask: FloatArray


@dataclass(frozen=True)
class StepBatch:
    """Rows of one step: first those of the prefill chunks, then one row a decoding slot, then the draft rows.

    positions, slots and cache_rows are [rows].
    """

    positions: IntArray
    slots: IntArray
    cache_rows: IntArray
    chunks: tuple[PrefillChunk, ...]
    groups: tuple[DecodeGroup, ...]

    @property
    def num_rows(self) -> int:
        """Tokens that go through the model in this step."""
        return len(self.positions)

    @property
    def num_prefill_rows(self) -> int:
        """Rows that belong to prefill chunks; they come first."""
        return sum(chunk.size for chunk in self.chunks)


def build_batch(
    cache: PagedKVCache,
    chunks: Sequence[PrefillChunk],
    decode_slots: IntArray,
    decode_positions: IntArray,
    draft_slots: IntArray = _NO_ROWS,
    draft_positions: IntArray = _NO_ROWS,
) -> StepBatch:
    """Lay out one step.

    ``decode_slots`` ascend and are distinct; ``draft_slots`` are a subset of them, ascending, each with the
    position after its decode position.
    """
    chunk_positions = [np.arange(chunk.start, chunk.stop) for chunk in chunks]
    chunk_slots = [np.full(chunk.size, chunk.slot) for chunk in chunks]
    positions = np.concatenate([*chunk_positions, decode_positions, draft_positions]).astype(np.int64, copy=False)
    slots = np.concatenate([*chunk_slots, decode_slots, draft_slots]).astype(np.int64, copy=False)
    first = sum(chunk.size for chunk in chunks)
    groups = _decode_groups(positions, slots, first, len(decode_slots))
    return StepBatch(positions, slots, cache.row_index(slots, positions), tuple(chunks), tuple(groups))


def context_length(position: int) -> int:
    """Length of the context that a token at ``position`` attends over: fixed steps, so that its bits are too."""
    return (position // CONTEXT_STEP + 1) * CONTEXT_STEP


def _decode_groups(positions: IntArray, slots: IntArray, first: int, num_decode: int) -> list[DecodeGroup]:
    rows = np.arange(first, first + num_decode)
    draft_rows = np.arange(first + num_decode, len(positions))
    bucket = positions // CONTEXT_STEP
    # second row of each decoding slot: its draft row if that has the same context length, else the row again
    second = rows.copy()
    partner = np.searchsorted(slots[rows], slots[draft_rows])
    joined = bucket[draft_rows] == bucket[rows[partner]]
    second[partner[joined]] = draft_rows[joined]
    alone = draft_rows[~joined]
    pairs = np.stack([np.concatenate([rows, alone]), np.concatenate([second, alone])], axis=1)
    if not len(draft_rows):
        pairs = pairs[:, :1]
    groups = []
    for value in sorted(set(bucket[pairs[:, 0]].tolist())):
        members = pairs[bucket[pairs[:, 0]] == value]
        context = (value + 1) * CONTEXT_STEP
        hidden = np.arange(context) > positions[members][:, :, None]
        mask = np.where(hidden, np.float32(-np.inf), np.float32(0))[:, :, None, :]
        groups.append(DecodeGroup(slots[members[:, 0]], members, context, mask))
    return groups
