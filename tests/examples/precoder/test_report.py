"""Evaluation and report: the figures are those of their definition, and every table and plot is made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from program import here

torch = pytest.importorskip("torch", reason="the extra xccl[precoder] is not installed")
pytest.importorskip("rich", reason="the extra xccl[precoder] is not installed")
pytest.importorskip("matplotlib", reason="the extra xccl[precoder] is not installed")

from precoder import inference, tables, wmmse  # noqa: E402
from precoder.channel import Channels, Scenario, gram  # noqa: E402
from precoder.config import TASKS  # noqa: E402
from precoder.evaluate import cells, channels_of, evaluate, reference  # noqa: E402


class ZeroForcing(torch.nn.Module):
    """A "network" whose rates are known."""

    def __init__(self) -> None:
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def coefficients(self, channels: Channels) -> torch.Tensor:
        return wmmse.start("zf", gram(channels.h))

    def precoder(self, channels: Channels) -> torch.Tensor:
        return channels.h @ self.coefficients(channels)


def test_figures_of_a_cell(tmp_path: Path) -> None:
    scenario = Scenario(3, antennas=4)
    cell = evaluate(ZeroForcing(), scenario, 30, tmp_path)
    channels = channels_of(scenario, 30)
    g = gram(channels.h)
    best = wmmse.best_of(channels)[0].max(0).values.numpy()
    rates = wmmse.rate(wmmse.start("zf", g), g, channels.alpha).numpy()
    assert cell["of_best"] == pytest.approx(rates.mean() / best.mean(), rel=1e-12)
    assert cell["percentile_5"] == pytest.approx(np.percentile(rates / best, 5), rel=1e-12)
    assert cell["of_best"] < cell["refined_of_best"] <= 1
    kept = reference(scenario, 30, tmp_path)
    np.testing.assert_array_equal(kept.best, best)
    assert (kept.best >= kept.rzf).all()


def test_cells_of_the_mixed_task_are_those_of_the_targets() -> None:
    groups = cells(TASKS["mixed"])
    assert {s.users for s in groups["trained"]} == {2, 4, 6, 8}
    assert {s.snr_db[0] for s in groups["trained"]} == {0.0, 10.0, 20.0}
    unseen = [s for kind, scenarios in groups.items() if kind != "trained" for s in scenarios]
    assert not set(unseen) & set(groups["trained"])


def test_targets_are_looked_up_in_the_cells(tmp_path: Path) -> None:
    groups = cells(TASKS["mixed"])
    network = ZeroForcing()
    some = {kind: [evaluate(network, s, 2, tmp_path) for s in scenarios[-1:]] for kind, scenarios in groups.items()}
    some["trained"][0]["refined_of_best"] = 0.9985
    some["weights"] = [{"scenario": {"weights": "equal"}, "of_best": 0.5}]
    some["users"] = [{"scenario": {"antennas": n}, "of_best": 0.99, "two_passes_of_best": 0.995} for n in (8, 16)]
    some["snr"] = [{"scenario": {}, "of_best": 1.0, "two_passes_of_best": 1.0}]
    rows = {row[0]: row[1:] for row in tables.targets({"mixed-upe-phase": [{"cells": some}]}).rows}
    assert rows["network + 3 WMMSE iterations, K=8, 20 dB"] == ["0.998", "0.9985", "", "one pass"]
    assert rows["equal weights, K=8: worst cell"] == ["0.993", "0.5000", "", "no"]
    assert rows["K=10, 12, 16, N=8: worst cell"] == ["0.994", "0.9900", "0.9950", "two passes"]
    assert rows["-5 and 25 dB: worst cell"] == ["0.994", "1.0000", "1.0000", "one pass"]
    assert "K=8, 10 dB" not in rows  # nothing was trained for it


def test_report_makes_tables_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["k4-upe-phase-0", "k4-upe-phase-1", "k8short-transformer-0", "few-upe-phase-0"]
    for run in runs:
        task, network, seed = run.split("-", 1)[0], run[run.index("-") + 1 : -2], run[-1]
        arguments = ("--network", network, "--steps", "2", "--batch", "8", "--seed", seed)
        assert here("train", task, *arguments, "--out", tmp_path / "runs" / run) == 0
    arguments = ("report", "--runs", tmp_path / "runs", "--out", tmp_path / "results", "--count", "20")
    capsys.readouterr()
    assert here(*arguments) == 0
    printed = capsys.readouterr().out
    assert "One cell, N=8" in printed
    text = (tmp_path / "results" / "tables.md").read_text()
    assert "| K=8, 10 dB | transformer |" in text
    assert "| 1,000 samples, K=4 | 0.999 |" in text
    figures = json.loads((tmp_path / "results" / "figures.json").read_text())
    assert set(figures) == set(runs)
    for plot in ("networks.png", "samples.png"):
        assert (tmp_path / "results" / plot).stat().st_size > 1000
    assert here(*arguments) == 0
    assert capsys.readouterr().out == printed


def test_inference_measures_every_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "ROUNDS", 1)
    monkeypatch.setattr(inference, "BATCH", 4)
    assert here("speed", "inference", "--out", tmp_path) == 0
    figures = json.loads((tmp_path / "speed-inference.json").read_text())
    assert {"upe-phase", "edge-gnn", "wmmse-20"} < set(figures["K=8"])
    for row in figures["K=8"].values():
        assert row["us"] > 0
        assert row["mflop"] > 0
