import json

import numpy as np
import pytest
from serving.tiny_model import CONFIG, random_tensors

from xccl.serving.config import ModelConfig
from xccl.serving.weights import ModelWeights


def written(tmp_path, **changes):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, **changes}))
    return path


def test_every_field_is_read(tmp_path):
    config = ModelConfig.load(written(tmp_path, note="ignored"))
    assert {name: getattr(config, name) for name in CONFIG} == CONFIG
    assert config.kv_width == CONFIG["kv_latent"] + CONFIG["qk_rope_dim"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 0}, "hidden must be a positive number, got 0"),
        ({"num_layers": "4"}, "num_layers must be a positive number, got '4'"),
        ({"qk_rope_dim": 3}, "qk_rope_dim must be even"),
        ({"num_topk": 7}, "num_topk 7 exceeds num_experts 6"),
    ],
)
def test_impossible_sizes(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.load(written(tmp_path, **change))


def test_missing_fields_are_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in CONFIG.items() if k not in ("hidden", "v_dim")}))
    with pytest.raises(ValueError, match="missing hidden, v_dim"):
        ModelConfig.load(path)


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    weights = ModelWeights(random_tensors(np.random.default_rng(0)), ModelConfig.load(written(tmp_path)))
    with pytest.raises(ValueError, match=r"tensor layers\.9\.attn_norm\.weight is missing"):
        weights.tensor("layers.9.attn_norm.weight", 32)
    with pytest.raises(ValueError, match=r"final_norm\.weight has shape \(32,\), expected \(33,\)"):
        weights.tensor("final_norm.weight", 33)
