"""SwiGLU feed-forward block: the dense layer and the shared expert."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xccl.serving.arrays import FloatArray
from xccl.serving.gemm import RowGemm


def swiglu(gate_up: FloatArray) -> FloatArray:
    """``silu(gate) * up`` for gate_up [rows, 2 * width], gate first: [rows, width]."""
    width = gate_up.shape[1] // 2
    gate = gate_up[:, :width]
    activated = np.exp(-gate)
    activated += np.float32(1)
    np.divide(gate, activated, out=activated)
    activated *= gate_up[:, width:]
    return activated


@dataclass(frozen=True)
class SwiGLU:
    """``down(silu(gate(x)) * up(x))``; gate_up [hidden, 2 * width] holds both matrices side by side."""

    gate_up: FloatArray
    down: FloatArray
    gemm: RowGemm

    def __call__(self, x: FloatArray) -> FloatArray:
        """x [rows, hidden] to [rows, hidden]."""
        return self.gemm.linear(swiglu(self.gemm.linear(x, self.gate_up)), self.down)
