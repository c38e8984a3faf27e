"""Dispatch and combine inside one process: the reference that needs no communication."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from xccl.reference import dequantize, quantize
from xccl.serving.arrays import AnyArray, FloatArray, IntArray


@dataclass(frozen=True)
class LocalHandle:
    """What :class:`LocalExperts` keeps between dispatch and combine."""

    num_recv_tokens_per_expert: AnyArray
    row_of_slot: IntArray
    topk_weights: FloatArray


class LocalExperts:
    """All experts in one process, float32, with the numerics and the row order of ``xccl.ExpertParallel``.

    ``quant`` "int8" quantises and dequantises every token as dispatch does (symmetric, one scale a token).
    """

    def __init__(self, num_experts: int, quant: str | None) -> None:
        if quant not in (None, "int8"):
            raise ValueError(f"quant must be None or 'int8', got {quant!r}")
        self._num_experts = num_experts
        self._quant = quant

    def dispatch_async(
        self, x: AnyArray, topk_idx: IntArray, topk_weights: FloatArray
    ) -> Callable[[], tuple[FloatArray, LocalHandle]]:
        """The hook returns the rows of x [tokens, hidden] sorted by (expert, token).

        topk_idx and topk_weights are [tokens, topk]; every index is that of an expert.
        """
        received = self._sorted_rows(x, topk_idx, topk_weights)
        return lambda: received

    def combine(self, y: AnyArray, handle: LocalHandle) -> FloatArray:
        """Weighted sum over each token's slots in slot order, float32: [tokens, hidden]."""
        tokens, num_topk = handle.row_of_slot.shape
        out: FloatArray = np.zeros((tokens, y.shape[1]), np.float32)
        for slot in range(num_topk):
            out += handle.topk_weights[:, slot, None] * y[handle.row_of_slot[:, slot]]
        return out

    def _sorted_rows(self, x: AnyArray, topk_idx: IntArray, topk_weights: FloatArray) -> tuple[FloatArray, LocalHandle]:
        num_topk = topk_idx.shape[1]
        flat = topk_idx.ravel()
        order = np.argsort(flat, kind="stable")
        row_of_slot = np.empty_like(order)
        row_of_slot[order] = np.arange(len(order))
        counts = np.bincount(flat, minlength=self._num_experts).astype(np.int32)
        delivered = x if self._quant is None else dequantize(*quantize(x), np.float32)
        handle = LocalHandle(counts, row_of_slot.reshape(topk_idx.shape), topk_weights)
        return delivered[order // num_topk], handle
