"""One decoder layer: attention and feed-forward, each after its norm and with its residual."""

from __future__ import annotations

from dataclasses import dataclass

from xccl.serving.arrays import FloatArray
from xccl.serving.attention import Attention
from xccl.serving.batch import StepBatch
from xccl.serving.kv_cache import PagedKVCache
from xccl.serving.mlp import SwiGLU
from xccl.serving.moe import MoEBlock
from xccl.serving.norm import rms_norm


@dataclass(frozen=True)
class DecoderLayer:
    """Attention and a dense or MoE block with their norms."""

    attention_norm: FloatArray
    attention: Attention
    ffn_norm: FloatArray
    ffn: SwiGLU | MoEBlock
    norm_eps: float

    def __call__(
        self, x: FloatArray, batch: StepBatch, rotation: tuple[FloatArray, FloatArray], cache: PagedKVCache
    ) -> FloatArray:
        """x [rows, hidden] to [rows, hidden]. Collective if the block is a MoE block."""
        x = x + self.attention(rms_norm(x, self.attention_norm, self.norm_eps), batch, rotation, cache)
        return x + self.ffn(rms_norm(x, self.ffn_norm, self.norm_eps))
