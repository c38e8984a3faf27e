import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xccl.serving.sampling import SamplingBatch, gumbel_noise, request_keys, sample


def batch(rows, temperature=1.0, top_p=1.0, seed=0, first_position=0, request_ids=None):
    ids = np.zeros(rows, np.int64) if request_ids is None else request_ids
    return SamplingBatch(
        np.full(rows, temperature, np.float32),
        np.full(rows, top_p, np.float32),
        request_keys(np.full(rows, seed), ids),
        np.arange(first_position, first_position + rows),
    )


def softmax(logits):
    p = np.exp(logits - logits.max())
    return p / p.sum()


def test_greedy_takes_the_largest_logit():
    logits = np.random.default_rng(0).standard_normal((50, 33)).astype(np.float32)
    assert np.array_equal(sample(logits, batch(50, temperature=0.0)), logits.argmax(axis=1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_softmax(temperature):
    logits = np.array([1.0, 0.0, -1.0, 2.0, 0.5], np.float32)
    n = 40000
    drawn = sample(np.tile(logits, (n, 1)), batch(n, temperature=temperature, seed=3))
    frequency = np.bincount(drawn, minlength=5) / n
    np.testing.assert_allclose(frequency, softmax(logits / temperature), atol=4 * 0.5 / np.sqrt(n))


def naive_nucleus(probability, top_p):
    kept, total = set(), 0.0
    for token in np.argsort(-probability, kind="stable"):
        kept.add(int(token))
        total += probability[token]
        if total >= top_p:
            break
    return kept


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), top_p=st.floats(0.05, 0.99), vocab=st.sampled_from([5, 129, 700]))
def test_top_p_draws_from_the_nucleus_only(seed, top_p, vocab):
    logits = (3 * np.random.default_rng(seed).standard_normal(vocab)).astype(np.float32)
    drawn = sample(np.tile(logits, (60, 1)), batch(60, top_p=top_p, seed=seed))
    # a hair wider, for the difference between float32 and float64 sums
    assert set(drawn.tolist()) <= naive_nucleus(softmax(logits.astype(np.float64)), top_p + 1e-5)


def test_top_p_keeps_the_whole_nucleus():
    """An almost flat distribution: the nucleus is wider than the first guess at its size."""
    logits = np.linspace(0, 0.01, 600, dtype=np.float32)[None]
    drawn = sample(np.repeat(logits, 20000, axis=0), batch(20000, top_p=0.9, seed=5))
    kept = naive_nucleus(softmax(logits[0].astype(np.float64)), 0.9)
    assert set(drawn.tolist()) == kept


def test_tiny_top_p_is_greedy():
    logits = np.random.default_rng(1).standard_normal((40, 300)).astype(np.float32)
    assert np.array_equal(sample(logits, batch(40, top_p=1e-6)), logits.argmax(axis=1))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**62), rows=st.integers(1, 40), top_p=st.sampled_from([0.7, 1.0]))
def test_a_row_is_the_same_alone_and_in_a_batch(seed, rows, top_p):
    logits = np.random.default_rng(seed).standard_normal((rows, 257)).astype(np.float32)
    whole = sample(logits, batch(rows, 0.8, top_p, seed))
    alone = [sample(logits[i : i + 1], batch(1, 0.8, top_p, seed, first_position=i))[0] for i in range(rows)]
    assert whole.tolist() == alone


def test_greedy_and_random_rows_in_one_batch():
    logits = np.random.default_rng(2).standard_normal((6, 50)).astype(np.float32)
    mixed = batch(6, temperature=1.0)
    mixed.temperature[::2] = 0
    got = sample(logits, mixed)
    assert np.array_equal(got[::2], logits[::2].argmax(axis=1))
    assert np.array_equal(got[1::2], sample(logits, batch(6))[1::2])


def test_noise_differs_by_seed_request_and_position_and_repeats():
    keys = request_keys(np.array([1, 1, 2]), np.array([0, 1, 0]))
    noise = [gumbel_noise(keys[i : i + 1], np.array([p]), 64)[0] for i in range(3) for p in (0, 1)]
    assert len({row.tobytes() for row in noise}) == 6
    assert np.array_equal(noise[0], gumbel_noise(keys[:1], np.array([0]), 64)[0])


def test_noise_is_standard_gumbel_and_uncorrelated():
    noise = gumbel_noise(request_keys(np.array([9]), np.array([0])).repeat(400), np.arange(400), 501)
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.01)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.02)
    assert abs(np.corrcoef(noise[:, 0::2][:, :250].ravel(), noise[:, 1::2].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.02
