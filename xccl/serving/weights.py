"""Reads model.safetensors and prepares each layer's matrices for the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from xccl.serving.arrays import FloatArray, IntArray
from xccl.serving.attention import AttentionWeights
from xccl.serving.config import ModelConfig
from xccl.serving.rope import even_odd_order


class ModelWeights:
    """Tensors of a model file as float32, by name; matrices are [in, out].

    Raises ValueError naming the tensor if one is missing or has an unexpected shape.
    """

    def __init__(self, tensors: dict[str, FloatArray], config: ModelConfig) -> None:
        self._tensors = tensors
        self.config = config

    @classmethod
    def load(cls, path: Path, config: ModelConfig) -> ModelWeights:
        """Read a safetensors file (float16 or float32 on disk)."""
        from safetensors.numpy import load_file

        return cls({name: value.astype(np.float32) for name, value in load_file(path).items()}, config)

    def tensor(self, name: str, *shape: int) -> FloatArray:
        """The tensor ``name``, which must have this shape."""
        if name not in self._tensors:
            raise ValueError(f"model file: tensor {name} is missing")
        value = self._tensors[name]
        if value.shape != shape:
            raise ValueError(f"model file: {name} has shape {value.shape}, expected {shape} by config.json")
        return value

    def attention(self, prefix: str) -> AttentionWeights:
        """Absorbed attention weights of the block ``prefix`` (see :mod:`xccl.serving.attention`)."""
        c = self.config
        query = self.tensor(f"{prefix}.attn.q.weight", c.hidden, c.num_heads * (c.qk_nope_dim + c.qk_rope_dim))
        kv_down = self.tensor(f"{prefix}.attn.kv_down.weight", c.hidden, c.kv_width)
        k_up = self.tensor(f"{prefix}.attn.k_up.weight", c.kv_latent, c.num_heads * c.qk_nope_dim)
        v_up = self.tensor(f"{prefix}.attn.v_up.weight", c.kv_latent, c.num_heads * c.v_dim)
        output = self.tensor(f"{prefix}.attn.o.weight", c.num_heads * c.v_dim, c.hidden)
        return AttentionWeights(
            query_kv=_absorb_query(c, query, kv_down, k_up),
            kv_norm=self.tensor(f"{prefix}.attn.kv_norm.weight", c.kv_latent),
            output=_absorb_output(c, v_up, output),
        )

    def swiglu(self, prefix: str, width: int) -> tuple[FloatArray, FloatArray]:
        """(gate_up [hidden, 2 * width], down [width, hidden]) of a dense block or shared expert."""
        gate = self.tensor(f"{prefix}.gate.weight", self.config.hidden, width)
        up = self.tensor(f"{prefix}.up.weight", self.config.hidden, width)
        down = self.tensor(f"{prefix}.down.weight", width, self.config.hidden)
        return np.concatenate([gate, up], axis=1), down

    def experts(self, prefix: str, local: IntArray) -> tuple[FloatArray, FloatArray]:
        """(gate_up, down) of the experts whose ids are in ``local``, stacked on axis 0."""
        c = self.config
        gate = self.tensor(f"{prefix}.gate.weight", c.num_experts, c.hidden, c.expert_ffn)[local]
        up = self.tensor(f"{prefix}.up.weight", c.num_experts, c.hidden, c.expert_ffn)[local]
        down = self.tensor(f"{prefix}.down.weight", c.num_experts, c.expert_ffn, c.hidden)[local]
        return np.concatenate([gate, up], axis=2), np.ascontiguousarray(down)


def gemm_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(in, out) of every matrix that meets a varying number of rows, for :func:`xccl.serving.gemm.probe`."""
    c = config
    return [
        (c.hidden, (c.num_heads + 1) * c.kv_width),
        (c.num_heads * c.kv_latent, c.hidden),
        (c.hidden, 2 * c.dense_ffn),
        (c.dense_ffn, c.hidden),
        (c.hidden, 2 * c.shared_ffn),
        (c.shared_ffn, c.hidden),
        (c.hidden, 2 * c.expert_ffn),
        (c.expert_ffn, c.hidden),
        (c.hidden, c.num_experts),
        (2 * c.hidden, c.hidden),
        (c.hidden, c.vocab_size),
    ]


def _absorb_query(c: ModelConfig, query: FloatArray, kv_down: FloatArray, k_up: FloatArray) -> FloatArray:
    order = even_odd_order(c.qk_rope_dim)
    scale = np.float32((c.qk_nope_dim + c.qk_rope_dim) ** -0.5)
    per_head = query.reshape(c.hidden, c.num_heads, c.qk_nope_dim + c.qk_rope_dim)
    k_heads = k_up.reshape(c.kv_latent, c.num_heads, c.qk_nope_dim)
    absorbed = np.einsum("dhn,lhn->dhl", per_head[:, :, : c.qk_nope_dim], k_heads)
    rope = per_head[:, :, c.qk_nope_dim :][:, :, order]
    queries = np.concatenate([absorbed, rope], axis=2) * scale
    kv = np.concatenate([kv_down[:, : c.kv_latent], kv_down[:, c.kv_latent :][:, order]], axis=1)
    return np.concatenate([queries.reshape(c.hidden, -1), kv], axis=1)


def _absorb_output(c: ModelConfig, v_up: FloatArray, output: FloatArray) -> FloatArray:
    v_heads = v_up.reshape(c.kv_latent, c.num_heads, c.v_dim)
    o_heads = output.reshape(c.num_heads, c.v_dim, c.hidden)
    absorbed: FloatArray = np.einsum("lhv,hvd->hld", v_heads, o_heads)
    return absorbed.reshape(c.num_heads * c.kv_latent, c.hidden)
