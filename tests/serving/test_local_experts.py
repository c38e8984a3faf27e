"""The reference without communication has the numerics of xccl.reference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xccl import reference
from xccl.serving.local_experts import LocalExperts


@pytest.mark.parametrize("quant", [None, "int8"])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(0, 30),
    experts=st.integers(1, 9),
    hidden=st.sampled_from([1, 5, 128]),
)
def test_bitwise_equal_to_the_oracle(quant, seed, tokens, experts, hidden):
    rng = np.random.default_rng(seed)
    topk = min(3, experts)
    x = (rng.standard_normal((tokens, hidden)) * 10.0 ** rng.integers(-42, 5, (tokens, 1))).astype(np.float32)
    idx = rng.integers(0, experts, (tokens, topk))
    weights = rng.random((tokens, topk), np.float32)
    expected = reference.dispatch([x], [idx], experts, quant=quant)[0]
    local = LocalExperts(experts, quant)
    recv_x, handle = local.dispatch_async(x, idx, weights)()
    assert np.array_equal(recv_x, expected.recv_x)
    assert np.array_equal(handle.num_recv_tokens_per_expert, expected.num_recv_tokens_per_expert)
    y = rng.standard_normal(recv_x.shape).astype(np.float32)
    assert np.array_equal(local.combine(y, handle), reference.combine([y], [idx], experts, [weights])[0])


def test_unknown_quantisation():
    with pytest.raises(ValueError, match="'fp8'"):
        LocalExperts(4, "fp8")
