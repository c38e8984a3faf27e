"""Channels: what they are drawn from, and that they are a function of the seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the extra xccl[precoder] is not installed")

from precoder.channel import Scenario, draw, generator  # noqa: E402
from precoder.rate import rate_of_precoder, weighted_sum_rate  # noqa: E402


@pytest.mark.parametrize("weights", ["uniform", "dirichlet", "equal", "mixed"])
def test_weights_sum_to_the_number_of_users(weights: str) -> None:
    alpha = draw(Scenario(5, weights=weights), 100, generator(0, 0)).alpha
    assert alpha.min() >= 0
    torch.testing.assert_close(alpha.sum(1), torch.full((100,), 5.0, dtype=torch.float64))


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 20.0])
def test_snr_is_in_the_channel(snr_db: float) -> None:
    h = draw(Scenario(4, snr_db=(snr_db, snr_db)), 4000, generator(0, 0)).h
    assert float(h.abs().square().mean()) == pytest.approx(10 ** (snr_db / 10), rel=0.02)


def test_neighbouring_antennas_are_correlated_as_asked() -> None:
    h = draw(Scenario(1, antennas=4, snr_db=(0, 0), correlation=0.7), 20000, generator(0, 0)).h
    covariance = (h @ h.mH).mean(0)
    wanted = 0.7 ** np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
    assert np.abs(covariance.numpy() - wanted).max() < 0.05


def test_one_seed_and_stream_give_one_batch() -> None:
    scenario = Scenario(3, snr_db=(0, 20), weights="mixed")
    first, again = (draw(scenario, 7, generator(4, 9)) for _ in range(2))
    other = draw(scenario, 7, generator(4, 10))
    assert torch.equal(first.h, again.h)
    assert torch.equal(first.alpha, again.alpha)
    assert not torch.equal(first.h, other.h)


@given(count=st.integers(1, 40), size=st.integers(1, 8))
def test_parts_make_the_whole_and_are_even(count: int, size: int) -> None:
    batch = draw(Scenario(2), count, generator(0, 0))
    parts = [batch.part(rank, size) for rank in range(size)]
    assert torch.equal(torch.cat([p.h for p in parts]), batch.h)
    assert torch.equal(torch.cat([p.alpha for p in parts]), batch.alpha)
    assert max(len(p.h) for p in parts) - min(len(p.h) for p in parts) <= 1


@pytest.mark.parametrize(
    "wrong", [{"users": 0}, {"antennas": 0}, {"snr_db": (3.0, 1.0)}, {"weights": "none"}, {"correlation": 1.0}]
)
def test_impossible_scenarios_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"got"):
        Scenario(**({"users": 2} | wrong))


def test_rate_is_the_sum_over_users_of_weighted_logarithms() -> None:
    channels = draw(Scenario(3, antennas=4), 5, generator(0, 0))
    v = channels.h / torch.linalg.matrix_norm(channels.h, keepdim=True)
    expected = np.zeros(5)
    h, alpha, x = channels.h.numpy(), channels.alpha.numpy(), v.numpy()
    for b in range(5):
        for k in range(3):
            powers = [abs(np.vdot(h[b, :, k], x[b, :, j])) ** 2 for j in range(3)]
            expected[b] += alpha[b, k] * np.log2(1 + powers[k] / (sum(powers) - powers[k] + 1))
    np.testing.assert_allclose(rate_of_precoder(channels.h, v, channels.alpha).numpy(), expected, rtol=1e-12)
    silent = weighted_sum_rate(torch.zeros(2, 3, 3), torch.ones(2, 3))
    assert torch.equal(silent, torch.zeros(2))
