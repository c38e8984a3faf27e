"""The MoE language model of one rank: its attention, its share of the experts, the MTP module."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from xccl.serving.arrays import FloatArray, IntArray
from xccl.serving.attention import Attention
from xccl.serving.batch import StepBatch
from xccl.serving.config import ModelConfig
from xccl.serving.decoder_layer import DecoderLayer
from xccl.serving.experts import GroupedExperts
from xccl.serving.gating import Gate
from xccl.serving.gemm import RowGemm, probe
from xccl.serving.kv_cache import PagedKVCache
from xccl.serving.mlp import SwiGLU
from xccl.serving.moe import MoEBlock
from xccl.serving.norm import rms_norm
from xccl.serving.rope import RotaryTable
from xccl.serving.transport import ExpertTransport
from xccl.serving.weights import ModelWeights, gemm_shapes


class MoEModel:
    """Embedding, decoder layers and head; the MTP block is layer ``num_layers`` of the cache.

    Every method that runs a MoE block is collective over the ranks of the transport.
    """

    def __init__(self, weights: ModelWeights, transport: ExpertTransport, local_experts: IntArray) -> None:
        config = weights.config
        self.config = config
        self.gemm: RowGemm = probe(gemm_shapes(config))
        self._rotary = RotaryTable(config.qk_rope_dim, config.rope_theta, config.max_context)
        hidden = (config.hidden,)
        self._embed = weights.tensor("embed.weight", config.vocab_size, config.hidden)
        self._head = weights.tensor("head.weight", config.hidden, config.vocab_size)
        self._final_norm = weights.tensor("final_norm.weight", *hidden)
        builder = _LayerBuilder(weights, transport, local_experts, self.gemm)
        self._layers = [
            builder.build(f"layers.{i}", i, dense=i < config.num_dense_layers) for i in range(config.num_layers)
        ]
        self._mtp_hidden_norm = weights.tensor("mtp.h_norm.weight", *hidden)
        self._mtp_embed_norm = weights.tensor("mtp.e_norm.weight", *hidden)
        self._mtp_proj = weights.tensor("mtp.proj.weight", 2 * config.hidden, config.hidden)
        self._mtp_block = builder.build("mtp.block", config.num_layers, dense=False)
        self._mtp_final_norm = weights.tensor("mtp.final_norm.weight", *hidden)

    @classmethod
    def load(cls, folder: Path, transport: ExpertTransport, local_experts: IntArray) -> MoEModel:
        """Load config.json and model.safetensors from a folder."""
        config = ModelConfig.load(folder / "config.json")
        return cls(ModelWeights.load(folder / "model.safetensors", config), transport, local_experts)

    @property
    def num_cache_layers(self) -> int:
        """Layers of KV cache: those of the model and the MTP block."""
        return self.config.num_layers + 1

    def forward(self, tokens: IntArray, batch: StepBatch, cache: PagedKVCache) -> FloatArray:
        """Run tokens [rows] through all layers; returns the last layer's output [rows, hidden], not normalised."""
        rotation = self._rotary.at(batch.positions)
        x: FloatArray = self._embed[tokens]
        for layer in self._layers:
            x = layer(x, batch, rotation, cache)
        return x

    def logits(self, x: FloatArray) -> FloatArray:
        """Logits [rows, vocab] of the next token for x [rows, hidden] from :meth:`forward`."""
        return self.gemm.linear(rms_norm(x, self._final_norm, self.config.norm_eps), self._head)

    def mtp_forward(self, x: FloatArray, next_tokens: IntArray, batch: StepBatch, cache: PagedKVCache) -> FloatArray:
        """Run the multi-token-prediction block on the model's output and the tokens that follow each row.

        x [rows, hidden] from :meth:`forward` at positions i, next_tokens [rows] the tokens i + 1.
        Returns [rows, hidden] for :meth:`mtp_logits`.
        """
        eps = self.config.norm_eps
        joined = np.concatenate(
            [rms_norm(x, self._mtp_hidden_norm, eps), rms_norm(self._embed[next_tokens], self._mtp_embed_norm, eps)],
            axis=1,
        )
        rotation = self._rotary.at(batch.positions)
        return self._mtp_block(self.gemm.linear(joined, self._mtp_proj), batch, rotation, cache)

    def mtp_logits(self, x: FloatArray) -> FloatArray:
        """Logits [rows, vocab] of token i + 2 for x [rows, hidden] from :meth:`mtp_forward`."""
        return self.gemm.linear(rms_norm(x, self._mtp_final_norm, self.config.norm_eps), self._head)


class _LayerBuilder:
    """Makes decoder layers from the tensors of a model file."""

    def __init__(
        self, weights: ModelWeights, transport: ExpertTransport, local_experts: IntArray, gemm: RowGemm
    ) -> None:
        self._weights = weights
        self._transport = transport
        self._local = local_experts
        self._gemm = gemm

    def build(self, prefix: str, index: int, *, dense: bool) -> DecoderLayer:
        """Layer ``prefix`` of the file, with KV cache layer ``index``."""
        w, c = self._weights, self._weights.config
        return DecoderLayer(
            attention_norm=w.tensor(f"{prefix}.attn_norm.weight", c.hidden),
            attention=Attention(index, w.attention(prefix), c.num_heads, c.kv_latent, c.norm_eps, self._gemm),
            ffn_norm=w.tensor(f"{prefix}.ffn_norm.weight", c.hidden),
            ffn=SwiGLU(*w.swiglu(f"{prefix}.ffn", c.dense_ffn), self._gemm) if dense else self._moe(prefix),
            norm_eps=c.norm_eps,
        )

    def _moe(self, prefix: str) -> MoEBlock:
        w, c = self._weights, self._weights.config
        gate = Gate(
            weight=w.tensor(f"{prefix}.router.weight", c.hidden, c.num_experts),
            bias=w.tensor(f"{prefix}.router.bias", c.num_experts),
            num_topk=c.num_topk,
            routed_scale=c.routed_scale,
            gemm=self._gemm,
        )
        experts = GroupedExperts(*w.experts(f"{prefix}.experts", self._local), self._gemm)
        shared = SwiGLU(*w.swiglu(f"{prefix}.shared", c.shared_ffn), self._gemm)
        return MoEBlock(gate, experts, shared, self._transport)
