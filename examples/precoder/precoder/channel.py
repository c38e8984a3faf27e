"""Random channels of the multi-user downlink, user weights, and SNR.

One base station with N antennas serves K users with one antenna each. Column k of H [N, K] is the channel of user k;
what stream j of the precoder V [N, K] does at user i is h_i^H v_j. Everywhere here H is scaled by sqrt(P) / sigma, so
that the noise has power 1 and the precoder has power 1: the SNR is in the channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

WeightLaw = Literal["uniform", "dirichlet", "equal", "mixed"]


@dataclass(frozen=True)
class Scenario:
    """What channels are drawn from: sizes, SNR = P / sigma^2 in dB (each sample's own, if a range), weights,
    correlation.

    Weights sum to K: "uniform" are numbers u from U(0, 1), normalised; "dirichlet" are uniform on the simplex; "mixed"
    are u^t, normalised, with each sample's own t: 0, so equal weights, for a third of them, else from U(0, 2).
    `correlation` is that of neighbouring antennas, r_mn = correlation^|m - n|; 0 is Rayleigh fading, independent and
    identical.
    """

    users: int
    antennas: int = 8
    snr_db: tuple[float, float] = (10.0, 10.0)
    weights: WeightLaw = "uniform"
    correlation: float = 0.0

    def __post_init__(self) -> None:
        if self.users < 1 or self.antennas < 1:
            raise ValueError(f"a scenario needs users and antennas, got K={self.users}, N={self.antennas}")
        if not self.snr_db[0] <= self.snr_db[1]:
            raise ValueError(f"snr_db is (lowest, highest), got {self.snr_db}")
        if self.weights not in get_args(WeightLaw):
            raise ValueError(f"weights are one of {', '.join(get_args(WeightLaw))}, got {self.weights!r}")
        if not 0 <= self.correlation < 1:
            raise ValueError(f"correlation is in [0, 1), got {self.correlation}")


class Channels(NamedTuple):
    """A batch: scaled channels h, complex [B, N, K], and user weights alpha, real [B, K], with sum K."""

    h: Tensor
    alpha: Tensor

    def part(self, rank: int, size: int) -> Channels:
        """The slice of rank `rank` of `size`; slices differ by at most one sample."""
        count = len(self.h)
        piece = slice(count * rank // size, count * (rank + 1) // size)
        return Channels(self.h[piece], self.alpha[piece])

    def to(self, dtype: torch.dtype) -> Channels:
        """The same in float32 or float64 (and the complex type that goes with it)."""
        return Channels(
            self.h.to(torch.complex64 if dtype == torch.float32 else torch.complex128), self.alpha.to(dtype)
        )


def generator(seed: int, stream: int) -> np.random.Generator:
    """Random numbers that depend on (seed, stream) only: the same on every rank, at every start."""
    return np.random.Generator(np.random.Philox(key=[seed, stream]))


def draw(scenario: Scenario, count: int, rng: np.random.Generator) -> Channels:
    """Draws `count` samples in complex128 / float64."""
    parts = rng.standard_normal((2, count, scenario.antennas, scenario.users)) * np.sqrt(0.5)
    h = parts[0] + 1j * parts[1]
    if scenario.correlation:
        distance = np.abs(np.subtract.outer(np.arange(scenario.antennas), np.arange(scenario.antennas)))
        h = np.linalg.cholesky(scenario.correlation**distance) @ h
    snr_db = rng.uniform(*scenario.snr_db, (count, 1, 1))
    h *= 10 ** (snr_db / 20)
    return Channels(torch.from_numpy(h), torch.from_numpy(_draw_weights(scenario, count, rng)))


def _draw_weights(scenario: Scenario, count: int, rng: np.random.Generator) -> np.ndarray:
    shape = (count, scenario.users)
    if scenario.weights == "equal":
        return np.ones(shape)
    weights = rng.standard_exponential(shape) if scenario.weights == "dirichlet" else rng.random(shape)
    if scenario.weights == "mixed":
        weights **= np.maximum(0, rng.uniform(-1, 2, (count, 1)))
    return weights * (scenario.users / weights.sum(1, keepdims=True))


def gram(h: Tensor) -> Tensor:
    """H^H H, [B, K, K]: all that the best precoder's coefficients depend on."""
    return h.mH @ h
