"""The plots of the report."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Runs = list[dict[str, Any]]


def draw(groups: dict[str, Runs], out: Path) -> None:
    """Draws each plot for which there are runs, as PNG."""
    mixed = groups.get("mixed-upe-phase")
    if mixed:
        _generalisation(mixed, out / "generalisation.png")
    single = {name: runs for name, runs in groups.items() if name.startswith("k8")}
    if single:
        _networks(single, out / "networks.png")
    samples = [runs for name, runs in groups.items() if runs[0]["config"]["users"] == [4]]
    if len(samples) > 1:
        _samples(samples, out / "samples.png")


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _ratio(runs: Runs, kind: str, index: int, key: str = "of_best") -> float:
    return mean(run["cells"][kind][index][key] for run in runs)


def _by_snr_and_users(runs: Runs, key: str) -> dict[float, dict[int, float]]:
    """Ratios at N = 8 and uniform weights."""
    points: dict[float, dict[int, float]] = {}
    for kind in ("trained", "users", "snr"):
        for index, cell in enumerate(runs[0]["cells"][kind]):
            scenario = cell["scenario"]
            if scenario["antennas"] == 8:
                points.setdefault(scenario["snr_db"][0], {})[scenario["users"]] = _ratio(runs, kind, index, key)
    return points


def _generalisation(runs: Runs, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    points, twice = _by_snr_and_users(runs, "of_best"), _by_snr_and_users(runs, "two_passes_of_best")
    for snr, by_users in sorted(points.items()):
        if len(by_users) > 1:
            left.plot(*zip(*sorted(by_users.items()), strict=True), "o-", label=f"{snr:.0f} dB")
    wide = [
        (cell["scenario"]["users"], _ratio(runs, kind, index))
        for kind in ("antennas", "users")
        for index, cell in enumerate(runs[0]["cells"][kind])
        if cell["scenario"]["antennas"] == 16
    ]
    left.plot(*zip(*wide, strict=True), "o--", color="C1", label="10 dB, N = 16")
    left.plot(*zip(*sorted(twice[10.0].items()), strict=True), "s:", color="C1", label="10 dB, two passes")
    left.axvspan(8.5, 16.5, color="0.92", label="not trained")
    left.set_xlabel("users K (N = 8 where not said)")
    left.set_ylabel("mean rate / best of 7 WMMSE starts")
    left.legend()
    for ratios, style, label in ((points, "o-", "one pass"), (twice, "s:", "two passes")):
        at_8 = sorted((snr, by_users[8]) for snr, by_users in ratios.items() if 8 in by_users)
        right.plot(*zip(*at_8, strict=True), style, color="C3", label=label)
    right.legend(loc="lower right")
    for low, high in ((-6, -0.5), (20.5, 26)):
        right.axvspan(low, high, color="0.92")
    right.set_xlabel("SNR in dB (K = N = 8)")
    for axes in (left, right):
        axes.axhline(1, color="0.6", linewidth=0.8)
        axes.grid(alpha=0.3)
    _save(figure, path)


def _networks(groups: dict[str, Runs], path: Path) -> None:
    bars = sorted(
        (_ratio(runs, "trained", 0), f"{runs[0]['config']['network']}, {runs[0]['config']['steps']} steps")
        for runs in groups.values()
    )
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.4 * len(bars)))
    drawn = axes.barh([name for _, name in bars], [height for height, _ in bars])
    axes.bar_label(drawn, fmt="%.4f", fontsize=8, padding=2)
    axes.set_xlabel("mean rate / best of 7 WMMSE starts (K = N = 8, 10 dB)")
    axes.set_xlim(0, 1.1)
    axes.axvline(1, color="0.6", linewidth=0.8)
    _save(figure, path)


def _samples(groups: list[Runs], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4))
    lines: dict[str, list[tuple[int, float]]] = {}
    for runs in groups:
        count = runs[0]["config"]["samples"]
        if count is not None:
            lines.setdefault(runs[0]["config"]["network"], []).append((count, _ratio(runs, "trained", 0)))
    for name, line in sorted(lines.items()):
        axes.plot(*zip(*sorted(line), strict=True), "o-", label=name)
    axes.set_xscale("log")
    axes.set_xlabel("training samples (K = 4, N = 8, 10 dB)")
    axes.set_ylabel("mean rate / best of 7 WMMSE starts")
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)
