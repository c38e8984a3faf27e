"""The MoE feed-forward block: gate, dispatch, experts, combine, and the shared expert."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xccl.serving.arrays import FloatArray
from xccl.serving.experts import GroupedExperts
from xccl.serving.gating import Gate
from xccl.serving.mlp import SwiGLU
from xccl.serving.transport import ExpertTransport


@dataclass(frozen=True)
class MoEBlock:
    """``shared(x) + sum_k w_k expert_k(x)``, the experts being spread over the ranks of the transport."""

    gate: Gate
    experts: GroupedExperts
    shared: SwiGLU
    transport: ExpertTransport

    def __call__(self, x: FloatArray) -> FloatArray:
        """x [rows, hidden] to [rows, hidden]. Collective: a rank without rows takes part with zero.

        The shared expert is computed while the tokens are on their way.
        """
        topk_idx, topk_weights = self.gate(x)
        receive = self.transport.dispatch_async(x, topk_idx, topk_weights)
        shared = self.shared(x)
        recv_x, handle = receive()
        y = self.experts(recv_x, handle.num_recv_tokens_per_expert)
        out: FloatArray = self.transport.combine(y, handle).astype(np.float32, copy=False)
        return shared + out
