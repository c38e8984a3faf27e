"""The router of a MoE layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xccl.serving.arrays import FloatArray, IntArray
from xccl.serving.gemm import RowGemm


@dataclass(frozen=True)
class Gate:
    """Sigmoid router with a bias that takes part in the selection only (aux-loss-free balancing).

    weight [hidden, experts], bias [experts].
    """

    weight: FloatArray
    bias: FloatArray
    num_topk: int
    routed_scale: float
    gemm: RowGemm

    def __call__(self, x: FloatArray) -> tuple[IntArray, FloatArray]:
        """Experts and weights of each token, both [rows, num_topk], best first; a tie goes to the lower id.

        The weights of a token sum to ``routed_scale``.
        """
        affinity = np.float32(1) / (np.float32(1) + np.exp(-self.gemm.linear(x, self.weight)))
        order = np.argsort(-(affinity + self.bias), axis=1, kind="stable")
        topk_idx: IntArray = np.ascontiguousarray(order[:, : self.num_topk])
        weights: FloatArray = affinity[np.arange(len(x))[:, None], topk_idx]
        weights *= np.float32(self.routed_scale) / np.add.reduce(weights, axis=1, keepdims=True)
        return topk_idx, weights
