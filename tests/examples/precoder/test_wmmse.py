"""WMMSE: monotone, of the right power, equal to the textbook's N x N form."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra xccl[precoder] is not installed")

from precoder import wmmse  # noqa: E402
from precoder.channel import Channels, Scenario, draw, generator, gram  # noqa: E402
from precoder.rate import rate_of_precoder  # noqa: E402

SIZES = [(4, 8), (8, 8), (8, 16), (3, 2)]  # K, N; the last has more users than antennas


def channels_of(users: int, antennas: int, snr_db: float, count: int = 40) -> Channels:
    return draw(Scenario(users, antennas, (snr_db, snr_db)), count, generator(1, users))


def channels_at_all_snrs(users: int, antennas: int) -> Channels:
    """40 channels at each of 0, 10 and 20 dB, in one batch: that takes hardly longer than one SNR."""
    batches = [channels_of(users, antennas, snr_db) for snr_db in (0.0, 10.0, 20.0)]
    return Channels(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def power(c: torch.Tensor, channels: Channels) -> torch.Tensor:
    return (channels.h @ c).abs().square().sum((1, 2))


@pytest.mark.parametrize(
    ("name", "users", "antennas"),
    # Zero forcing needs K <= N.
    [(n, k, a) for n in ("mrt", "zf", "rzf", "random") for k, a in SIZES if n != "zf" or k <= a],
)
def test_rate_never_falls_and_power_is_met(name: str, users: int, antennas: int) -> None:
    channels = channels_at_all_snrs(users, antennas)
    g = gram(channels.h)
    c = wmmse.start(name, g, generator(0, 0))
    assert (power(c, channels) - 1).abs().max() < 1e-10
    before = wmmse.rate(c, g, channels.alpha)
    for _ in range(100):
        c = wmmse.iterate(c, g, channels.alpha, 1, "exact")
        after = wmmse.rate(c, g, channels.alpha)
        assert (after - before).min() >= -1e-10
        assert (power(c, channels) - 1).abs().max() <= 1e-10
        before = after


def textbook_step(h: np.ndarray, v: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """One WMMSE iteration of one sample in N x N form, the multiplier by bisection."""
    received = h.conj().T @ v
    total = (np.abs(received) ** 2).sum(1) + 1
    u = np.diag(received) / total
    w = 1 / (1 - np.abs(np.diag(received)) ** 2 / total)
    matrix = (h * (alpha * w * np.abs(u) ** 2)) @ h.conj().T
    low, high = 0.0, 1e4
    for _ in range(200):
        mu = (low + high) / 2
        new = np.linalg.solve(matrix + mu * np.eye(len(h)), h * (alpha * w * u))
        low, high = (mu, high) if (np.abs(new) ** 2).sum() > 1 else (low, mu)
    return new


@pytest.mark.parametrize(("users", "antennas"), SIZES)
def test_equals_the_textbook_form(users: int, antennas: int) -> None:
    channels = channels_of(users, antennas, 10.0, 5)
    g = gram(channels.h)
    c = wmmse.start("mrt", g)
    h, alpha = channels.h.numpy(), channels.alpha.numpy()
    v = [(channels.h @ c)[b].numpy() for b in range(5)]
    for _ in range(3):
        c = wmmse.iterate(c, g, channels.alpha, 1, "exact")
        v = [textbook_step(h[b], v[b], alpha[b]) for b in range(5)]
    np.testing.assert_allclose((channels.h @ c).numpy(), np.stack(v), atol=1e-9)


def test_end_of_the_fast_form_is_a_fixed_point_of_the_exact_one() -> None:
    channels = channels_of(4, 8, 10.0)
    g = gram(channels.h)
    fast = wmmse.iterate(wmmse.start("rzf", g), g, channels.alpha, 5000, "fast")
    exact = wmmse.iterate(fast, g, channels.alpha, 1, "exact")
    torch.testing.assert_close(fast, exact, atol=1e-4, rtol=0)
    gain = wmmse.rate(exact, g, channels.alpha) - wmmse.rate(fast, g, channels.alpha)
    assert gain.abs().max() < 1e-6


def test_best_of_gives_every_rate_and_the_best_coefficients() -> None:
    channels = channels_of(4, 8, 10.0)
    rates, c = wmmse.best_of(channels, starts=4, iterations=20)
    assert rates.shape == (4, 40)
    found = rate_of_precoder(channels.h, channels.h @ c, channels.alpha)
    torch.testing.assert_close(found, rates.max(0).values)


def test_a_user_without_weight_gets_no_power() -> None:
    channels = channels_of(3, 4, 10.0)
    channels.alpha[:, 0] = 0
    g = gram(channels.h)
    for method in ("exact", "fast"):
        c = wmmse.iterate(wmmse.start("rzf", g), g, channels.alpha, 3, method)
        assert c[:, :, 0].abs().max() == 0
        assert c.isfinite().all()


def test_wrong_names_are_refused() -> None:
    g = gram(channels_of(2, 2, 0.0).h)
    with pytest.raises(ValueError, match=r"one of mrt, zf, rzf, random, got 'best'"):
        wmmse.start("best", g)
    with pytest.raises(ValueError, match=r"needs rng"):
        wmmse.start("random", g)
    with pytest.raises(ValueError, match=r"exact, fast, got 'slow'"):
        wmmse.iterate(g, g, torch.ones(40, 2), 1, "slow")
