"""The routed experts that one rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xccl.serving.arrays import AnyArray, FloatArray
from xccl.serving.gemm import RowGemm
from xccl.serving.mlp import swiglu


@dataclass(frozen=True)
class GroupedExperts:
    """SwiGLU experts applied to rows in expert order, as ``ExpertParallel.dispatch`` delivers them.

    gate_up [local experts, hidden, 2 * width], down [local experts, width, hidden].
    """

    gate_up: FloatArray
    down: FloatArray
    gemm: RowGemm

    def __call__(self, recv_x: AnyArray, counts: AnyArray) -> FloatArray:
        """recv_x [rows, hidden] sorted by local expert, counts [local experts]: expert outputs [rows, hidden]."""
        rows, hidden = recv_x.shape
        slack = self.gemm.min_rows - 1
        x = np.empty((rows + slack, hidden), np.float32)
        x[:rows] = recv_x
        x[rows:] = 0
        gate_up = np.zeros((rows + slack, self.gate_up.shape[2]), np.float32)
        out = np.empty((rows + slack, hidden), np.float32)
        sizes = counts.tolist()
        self.gemm.grouped(x, sizes, self.gate_up, gate_up)
        self.gemm.grouped(swiglu(gate_up), sizes, self.down, out)
        return out[:rows]
