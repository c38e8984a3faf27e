"""Multi-head latent attention (MLA) in the absorbed form, over the paged latent cache.

The key up-projection is multiplied into the query projection and the value up-projection into the output
projection when the weights are loaded. So queries meet the cached latent rows directly, all heads share one row
of ``kv_latent + qk_rope_dim`` floats a token, and nothing is expanded per step.

Prefill and decode are separate objects: they may live on separate ranks. Both use products whose shape depends on
the request alone (its chunk, its context length in fixed steps), never on what else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xccl.serving.arrays import FloatArray
from xccl.serving.batch import DecodeGroup, PrefillChunk, StepBatch, context_length
from xccl.serving.gemm import RowGemm
from xccl.serving.kv_cache import PagedKVCache
from xccl.serving.norm import rms_norm
from xccl.serving.rope import rotate


@dataclass(frozen=True)
class AttentionWeights:
    """Absorbed weights of one layer.

    query_kv [hidden, (heads + 1) * (latent + rope)]: for each head the absorbed, scaled query, then the latent KV;
    output [heads * latent, hidden].
    """

    query_kv: FloatArray
    kv_norm: FloatArray
    output: FloatArray


class PrefillAttention:
    """Attention of prompt chunks: many query rows of one slot against that slot's context."""

    def __init__(self, num_heads: int, kv_latent: int) -> None:
        self._heads = num_heads
        self._latent = kv_latent

    def __call__(self, query: FloatArray, cache: PagedKVCache, layer: int, chunk: PrefillChunk) -> FloatArray:
        """query [chunk rows, heads, width]: weighted latent rows [chunk rows, heads * latent]."""
        context = context_length(chunk.stop - 1)
        keys = cache.gather(layer, np.array([chunk.slot]), context)[0]
        scores = (query.reshape(-1, query.shape[2]) @ keys.T).reshape(chunk.size, self._heads, context)
        hidden = np.arange(context) > np.arange(chunk.start, chunk.stop)[:, None]
        scores += np.where(hidden, np.float32(-np.inf), np.float32(0))[:, None, :]
        denominator = _exponentiate(scores)
        mixed: FloatArray = scores.reshape(-1, context) @ keys[:, : self._latent]
        mixed /= denominator.reshape(-1, 1)
        return mixed.reshape(chunk.size, self._heads * self._latent)


class DecodeAttention:
    """Attention of generated tokens: one or two query rows a slot, all slots of a group in one call."""

    def __init__(self, num_heads: int, kv_latent: int) -> None:
        self._heads = num_heads
        self._latent = kv_latent
        self._keys: FloatArray = np.empty(0, np.float32)

    def __call__(self, query: FloatArray, cache: PagedKVCache, layer: int, group: DecodeGroup) -> FloatArray:
        """query [batch rows, heads, width]: weighted latent rows [slots, rows a slot, heads * latent]."""
        keys = cache.gather(layer, group.slots, group.context, self._buffer(cache, group))[:, None]
        scores = np.matmul(query[group.rows], keys.swapaxes(-1, -2))
        scores += group.mask
        denominator = _exponentiate(scores)
        mixed: FloatArray = np.matmul(scores, keys[..., : self._latent])
        mixed /= denominator
        return mixed.reshape(*group.rows.shape, self._heads * self._latent)

    def _buffer(self, cache: PagedKVCache, group: DecodeGroup) -> FloatArray:
        """Reused memory for the gathered context: fresh pages would cost more than the copy."""
        size = len(group.slots) * group.context * cache.width
        if self._keys.size < size:
            self._keys = np.empty(size, np.float32)
        return self._keys[:size]


class Attention:
    """One layer's attention: projections of all rows together, then prefill and decode on their own rows."""

    def __init__(
        self,
        layer: int,
        weights: AttentionWeights,
        num_heads: int,
        kv_latent: int,
        norm_eps: float,
        gemm: RowGemm,
    ) -> None:
        self._layer = layer
        self._weights = weights
        self._heads = num_heads
        self._latent = kv_latent
        self._eps = norm_eps
        self._gemm = gemm
        self._prefill = PrefillAttention(num_heads, kv_latent)
        self._decode = DecodeAttention(num_heads, kv_latent)

    def __call__(
        self, x: FloatArray, batch: StepBatch, rotation: tuple[FloatArray, FloatArray], cache: PagedKVCache
    ) -> FloatArray:
        """x [rows, hidden], normalised, to [rows, hidden]; writes the rows' KV into the cache first."""
        rows = x.shape[0]
        projected = self._gemm.linear(x, self._weights.query_kv).reshape(rows, self._heads + 1, cache.width)
        rotate(projected[:, :, self._latent :], *rotation)
        new_kv = projected[:, self._heads]
        new_kv[:, : self._latent] = rms_norm(new_kv[:, : self._latent], self._weights.kv_norm, self._eps)
        cache.write(self._layer, batch.cache_rows, new_kv)
        query = projected[:, : self._heads]
        mixed = np.empty((rows, self._heads * self._latent), np.float32)
        start = 0
        for chunk in batch.chunks:
            stop = start + chunk.size
            mixed[start:stop] = self._prefill(query[start:stop], cache, self._layer, chunk)
            start = stop
        for group in batch.groups:
            mixed[group.rows] = self._decode(query, cache, self._layer, group)
        return self._gemm.linear(mixed, self._weights.output)


def _exponentiate(scores: FloatArray) -> FloatArray:
    """Replace scores by exp(scores - row maximum) in place; returns the row sums, last axis kept."""
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    sums: FloatArray = np.add.reduce(scores, axis=-1, keepdims=True)
    return sums
