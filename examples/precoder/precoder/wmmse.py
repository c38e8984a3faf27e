"""WMMSE, the iteration that learned precoders are compared with, in K x K form: V = H C, so that N does not matter.

All in complex128, for a batch of scaled channels (noise 1, power 1; see channel.py). A start matters as much as the
number of iterations, because the iteration ends in a local optimum: `best_of` takes the best of several.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from precoder.channel import Channels, generator, gram
from precoder.rate import weighted_sum_rate

Start = Literal["mrt", "zf", "rzf", "random"]
Method = Literal["exact", "fast"]
BISECTIONS = 60


def start(name: Start, g: Tensor, rng: np.random.Generator | None = None) -> Tensor:
    """Coefficients C [B, K, K] of a precoder V = H C to start from; g = H^H H. Power 1, for all but "random" equal
    in all streams.

    "mrt": matched filter; "zf": zero forcing (needs K <= N); "rzf": with the regularisation K for noise and power 1;
    "random": Gaussian.
    """
    users = g.shape[-1]
    eye = torch.eye(users, dtype=g.dtype).expand_as(g)
    if name == "mrt":
        c = eye
    elif name == "zf":
        c = torch.linalg.inv(g)
    elif name == "rzf":
        c = torch.linalg.inv(g + users * eye)
    elif name == "random":
        if rng is None:
            raise ValueError('the start "random" needs rng')
        parts = rng.standard_normal((2, *g.shape))
        return to_unit_power(torch.from_numpy(parts[0] + 1j * parts[1]), g)
    else:
        raise ValueError(f"a start is one of {', '.join(get_args(Start))}, got {name!r}")
    power = (c.conj() * (g @ c)).real.sum(-2, keepdim=True)
    return c / (power * users).sqrt()


def iterate(c: Tensor, g: Tensor, alpha: Tensor, iterations: int, method: Method = "exact") -> Tensor:
    """Coefficients after `iterations` steps from c; power 1.

    "exact" finds the multiplier of the power constraint by bisection: the rate never decreases and the power is met
    at each step. "fast" lets the noise follow the power instead, and scales at the end: one solution of a K x K
    system a step, the same fixed points, but the path, and so the local optimum, may differ.
    """
    if method not in get_args(Method):
        raise ValueError(f"a method is one of {', '.join(get_args(Method))}, got {method!r}")
    step = _exact_step if method == "exact" else _fast_step
    for _ in range(iterations):
        c = step(c, g, alpha)
    return to_unit_power(c, g)


def to_unit_power(c: Tensor, g: Tensor) -> Tensor:
    """The coefficients [B, K, K] scaled to a precoder of power 1."""
    return c / _power(c, g @ c)[:, None, None].sqrt()


def _power(c: Tensor, received: Tensor) -> Tensor:
    return (c.conj() * received).real.sum((-2, -1))


def _receivers(received: Tensor, noise: Tensor | float) -> tuple[Tensor, Tensor]:
    """MMSE receivers u and inverse mean square errors w, [B, K]."""
    total = received.abs().square().sum(-1) + noise
    wanted = received.diagonal(0, -2, -1)
    return wanted / total, total / (total - wanted.abs().square())


def _exact_step(c: Tensor, g: Tensor, alpha: Tensor) -> Tensor:
    u, w = _receivers(g @ c, 1.0)
    root = (alpha * w).sqrt() * u.abs()
    values, vectors = torch.linalg.eigh(root[:, :, None] * g * root[:, None, :])
    values = values.clamp_min(0)
    load = (vectors.abs().square() * (alpha * w)[:, :, None]).sum(-2)
    multiplier = _multiplier(values, load)
    inner = vectors @ (vectors.mH / (values + multiplier)[:, :, None])
    c = root[:, :, None] * inner * ((alpha * w).sqrt() * torch.sgn(u))[:, None, :]
    return to_unit_power(c, g)  # takes away what eigh's round-off leaves, 1e-9 at most


def _multiplier(values: Tensor, load: Tensor) -> Tensor:
    """mu >= 0 with sum_m values_m load_m / (values_m + mu)^2 = 1, [B, 1]."""
    power = values * load
    low = torch.full_like(power[:, :1], 1e-14)
    high = power.sum(-1, keepdim=True).sqrt()
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        too_much = (power / (values + middle).square()).sum(-1, keepdim=True) > 1
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return (low + high) / 2


def _fast_step(c: Tensor, g: Tensor, alpha: Tensor) -> Tensor:
    received = g @ c
    u, w = _receivers(received, _power(c, received)[:, None])
    d = alpha * w * u.abs().square()
    system = d[:, :, None] * g
    system.diagonal(0, -2, -1).add_(d.sum(-1, keepdim=True))
    return torch.linalg.solve(system, torch.diag_embed(alpha * w * u))


def rate(c: Tensor, g: Tensor, alpha: Tensor) -> Tensor:
    """Weighted sum rate [B] of V = H C."""
    return weighted_sum_rate((g @ c).abs().square(), alpha)


def best_of(
    channels: Channels, starts: int = 7, iterations: int = 300, method: Method = "fast", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Rates [starts, B] after `iterations` from RZF, MRT and random starts, and the best coefficients, [B, K, K]."""
    g, alpha = gram(channels.h), channels.alpha
    rng = generator(seed, 7)
    names: list[Start] = ["rzf", "mrt", *["random"] * (starts - 2)]
    ends = torch.stack([iterate(start(name, g, rng), g, alpha, iterations, method) for name in names[:starts]])
    rates = torch.stack([rate(c, g, alpha) for c in ends])
    return rates, ends[rates.argmax(0), torch.arange(len(alpha))]
