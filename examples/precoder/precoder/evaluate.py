"""How good a trained network is: its mean rate over that of the best of 7 WMMSE starts, cell by cell."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from precoder import wmmse
from precoder.channel import Channels, Scenario, draw, generator, gram
from precoder.config import TrainConfig
from precoder.rate import rate_of_precoder
from precoder.second_pass import two_passes

TEST_SEED = 2**48  # training seeds are smaller, so no test channel was trained on
STARTS = 7
ITERATIONS = 300
CHUNK = 250


@dataclass(frozen=True)
class Reference:
    """Rates of WMMSE on one cell's test channels, [count] each."""

    best: np.ndarray
    rzf: np.ndarray


def channels_of(scenario: Scenario, count: int) -> Channels:
    """The cell's test channels: always the same ones."""
    stream = int.from_bytes(hashlib.sha256(repr(scenario).encode()).digest()[:6], "big")
    return draw(scenario, count, generator(TEST_SEED, stream))


def reference(scenario: Scenario, count: int, cache: Path) -> Reference:
    """WMMSE on the cell's test channels, 300 iterations from each of 7 starts. Kept in the folder `cache`."""
    key = hashlib.sha256(repr((scenario, count, STARTS, ITERATIONS)).encode()).hexdigest()[:16]
    path = cache / f"wmmse-{key}.npz"
    if not path.exists():
        rates, _ = wmmse.best_of(channels_of(scenario, count), STARTS, ITERATIONS)
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(path, best=rates.max(0).values.numpy(), rzf=rates[0].numpy())
    with np.load(path) as file:
        return Reference(file["best"], file["rzf"])


def learned_rates(network: nn.Module, channels: Channels) -> np.ndarray:
    """Rates [count] of the network, run in its own precision, its precoder then scaled to power 1 in float64."""
    precision = next(network.parameters()).dtype
    rates = []
    with torch.no_grad():
        for h, alpha in zip(channels.h.split(CHUNK), channels.alpha.split(CHUNK), strict=True):
            v = network.precoder(Channels(h, alpha).to(precision)).to(torch.complex128)
            rates.append(rate_of_precoder(h, v / torch.linalg.matrix_norm(v, keepdim=True), alpha))
    return torch.cat(rates).numpy()


def refined_rates(network: nn.Module, channels: Channels, iterations: int) -> np.ndarray:
    """Rates [count] of WMMSE that starts from the network's precoder. For networks that give coefficients C."""
    precision = next(network.parameters()).dtype
    with torch.no_grad():
        c = network.coefficients(channels.to(precision)).to(torch.complex128)
    g = gram(channels.h)
    return wmmse.rate(wmmse.iterate(c, g, channels.alpha, iterations), g, channels.alpha).numpy()


def two_pass_rates(network: nn.Module, channels: Channels) -> np.ndarray:
    """Rates [count] of the better of two passes; see second_pass.py. For networks that give coefficients C."""
    with torch.no_grad():
        c = two_passes(network, channels)
    return wmmse.rate(c, gram(channels.h), channels.alpha).numpy()


def evaluate(network: nn.Module, scenario: Scenario, count: int, cache: Path) -> dict[str, Any]:
    """One cell: ratios of mean rates, and the 5th percentile of the samples' ratios to the best of 7."""
    channels = channels_of(scenario, count)
    wanted = reference(scenario, count, cache)
    rates = learned_rates(network, channels)
    cell = {
        "scenario": asdict(scenario) | {"snr_db": list(scenario.snr_db)},  # as JSON will have it
        "count": count,
        "rate": float(rates.mean()),
        "of_best": float(rates.mean() / wanted.best.mean()),
        "of_rzf": float(rates.mean() / wanted.rzf.mean()),
        "percentile_5": float(np.percentile(rates / wanted.best, 5)),
    }
    if hasattr(network, "coefficients"):
        refined = refined_rates(network, channels, 3)
        cell["refined_of_best"] = float(refined.mean() / wanted.best.mean())
        cell["two_passes_of_best"] = float(two_pass_rates(network, channels).mean() / wanted.best.mean())
    return cell


def cells(config: TrainConfig) -> dict[str, list[Scenario]]:
    """The cells on which a run is tested, in groups that become the tables; "trained" is what it was trained for."""
    if len(config.users) == 1:
        return {"trained": [Scenario(config.users[0], config.antennas, config.snr_db)]}
    return {
        "trained": [Scenario(k, snr_db=(s, s)) for s in (0.0, 10.0, 20.0) for k in (2, 4, 6, 8)],
        "users": [Scenario(k, antennas=n) for n in (8, 16) for k in (10, 12, 16)],
        "antennas": [Scenario(8, antennas=n) for n in (16, 32)],
        "snr": [Scenario(8, snr_db=(s, s)) for s in (-5.0, 25.0)],
        "weights": [Scenario(8, snr_db=(s, s), weights=w) for w in ("equal", "dirichlet") for s in (10.0, 20.0)],
        "correlation": [Scenario(8, correlation=r) for r in (0.5, 0.9)],
    }
