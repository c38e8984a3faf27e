"""Shape of the model: what config.json in a model folder says."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a DeepSeek-style MoE model; field names are those of config.json.

    Layers below ``num_dense_layers`` have a dense feed-forward block, the others a MoE block. One KV cache row
    is ``kv_latent + qk_rope_dim`` floats a token and layer (the absorbed form of MLA, xDeepServe §2.1).
    """

    vocab_size: int
    hidden: int
    num_layers: int
    num_dense_layers: int
    dense_ffn: int
    num_experts: int
    num_topk: int
    expert_ffn: int
    shared_ffn: int
    num_heads: int
    qk_nope_dim: int
    qk_rope_dim: int
    v_dim: int
    kv_latent: int
    rope_theta: float
    max_context: int
    norm_eps: float
    eot_token: int
    routed_scale: float

    @property
    def kv_width(self) -> int:
        """Floats that the cache keeps for one token in one layer."""
        return self.kv_latent + self.qk_rope_dim

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the main model, without the MTP block."""
        return self.num_layers - self.num_dense_layers

    @classmethod
    def load(cls, path: Path) -> ModelConfig:
        """Read a config.json. Raises ValueError if a field is missing or a size is not positive."""
        raw = json.loads(path.read_text())
        missing = [field.name for field in fields(cls) if field.name not in raw]
        if missing:
            raise ValueError(f"{path}: missing {', '.join(missing)}")
        config = cls(**{field.name: raw[field.name] for field in fields(cls)})
        config._validate(path)
        return config

    def _validate(self, path: Path) -> None:
        may_be_zero = {"num_dense_layers", "eot_token"}
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or value < 0 or (value == 0 and field.name not in may_be_zero):
                raise ValueError(f"{path}: {field.name} must be a positive number, got {value!r}")
        if self.qk_rope_dim % 2:
            raise ValueError(f"{path}: qk_rope_dim must be even (rotation works on pairs), got {self.qk_rope_dim}")
        if self.num_topk > self.num_experts:
            raise ValueError(f"{path}: num_topk {self.num_topk} exceeds num_experts {self.num_experts}")
