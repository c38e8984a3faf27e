"""Time and floating point operations of one precoder: the networks, and the K x K WMMSE that they are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from precoder import wmmse
from precoder.channel import Scenario, draw, generator, gram
from precoder.registry import build, names
from precoder.second_pass import two_passes
from precoder.train import settled_process

BATCH = 256
ROUNDS = 9
ITERATIONS = (20, 100)


@settled_process()
def measure() -> dict[str, Any]:
    """{"K=4": {"upe-phase": {"us": ..., "mflop": ...}, ..., "wmmse-20": ...}, "K=8": ...}, a sample."""
    return {f"K={users}": _measure_users(users) for users in (4, 8)}


def _measure_users(users: int) -> dict[str, Any]:
    channels = draw(Scenario(users), BATCH, generator(0, users))
    single = channels.to(torch.float32)
    g = gram(channels.h)
    calls: dict[str, Callable[[], Any]] = {}
    mflop: dict[str, float] = {}
    for name in names():
        network = build(name, 8)
        calls[name] = lambda network=network: network.precoder(single)
        mflop[name] = _count(calls[name])
    # Untrained, it serves all users: the second pass is as large as the first, its highest cost.
    twice = build("upe-phase", 8)
    calls["upe-phase, two passes"] = lambda: two_passes(twice, channels)
    mflop["upe-phase, two passes"] = _count(calls["upe-phase, two passes"])
    for iterations in ITERATIONS:
        name = f"wmmse-{iterations}"
        calls[name] = lambda count=iterations: wmmse.iterate(wmmse.start("rzf", g), g, channels.alpha, count, "fast")
        mflop[name] = iterations * wmmse_mflop(users)
    times = _interleaved(calls)
    return {name: {"us": 1e6 * times[name] / BATCH, "mflop": mflop[name]} for name in calls}


def wmmse_mflop(users: int) -> float:
    """Millions of real operations of one fast iteration: G C (8 K^3), the complex LU (8/3 K^3), K solutions (8 K^3)."""
    return (8 + 8 / 3 + 8) * users**3 / 1e6


def _count(call: Callable[[], Any]) -> float:
    """Real operations of the matrix products, which are nearly all, in millions a sample."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / BATCH / 1e6


def _interleaved(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in times.items()}
