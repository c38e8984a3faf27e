"""The NumPy forward of the model that is shipped, against logits that PyTorch computed."""

import numpy as np
import pytest
from serving.shipped_reference import KEPT, MODEL, fingerprint

from xccl.serving.batch import PrefillChunk, build_batch
from xccl.serving.kv_cache import PagedKVCache
from xccl.serving.local_experts import LocalExperts
from xccl.serving.model import MoEModel

NONE = np.empty(0, np.int64)


@pytest.fixture(scope="module")
def reference():
    kept = dict(np.load(KEPT))
    assert kept["weights"] == fingerprint(), "the shipped weights are new: see tests/serving/shipped_reference.py"
    return kept


@pytest.fixture(scope="module")
def model():
    return MoEModel.load(MODEL, LocalExperts(32, None), np.arange(32))


def test_prefill(reference, model):
    count = len(reference["tokens"])
    cache = PagedKVCache(model.num_cache_layers, 1, model.config.max_context, model.config.kv_width, 16)
    assert cache.reserve(0, count)
    batch = build_batch(cache, [PrefillChunk(0, 0, count)], NONE, NONE)
    x = model.forward(reference["tokens"], batch, cache)
    y = model.mtp_forward(x, reference["next_tokens"], batch, cache)
    rows = reference["rows"]
    np.testing.assert_allclose(model.logits(x[rows]), reference["logits"], atol=1e-3)
    np.testing.assert_allclose(model.mtp_logits(y[rows]), reference["mtp_logits"], atol=1e-3)


def test_decode(reference, model):
    cache = PagedKVCache(model.num_cache_layers, 1, model.config.max_context, model.config.kv_width, 16)
    assert cache.reserve(0, len(reference["tokens"]))
    logits = []
    for i, token in enumerate(reference["tokens"]):
        batch = build_batch(cache, [], np.array([0]), np.array([i]))
        logits.append(model.logits(model.forward(np.array([token]), batch, cache))[0])
    np.testing.assert_allclose(np.array(logits)[reference["rows"]], reference["logits"], atol=1e-3)
