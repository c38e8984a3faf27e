"""The tables of the report, as text for a terminal and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table as RichTable

Runs = list[dict[str, Any]]


@dataclass
class Table:
    """A title, a header, rows of text."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def rich(self) -> RichTable:
        """For a terminal."""
        table = RichTable(*self.header, title=self.title, title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a README."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return f"**{self.title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def build(groups: dict[str, Runs], out: Path) -> list[Table]:
    """All tables for which there are runs. `groups` are the seeds of each run; `out` may hold measurements of speed."""
    makers = [_single, _mixed, _generalisation, _samples, targets]
    found = [maker(groups) for maker in makers]
    return [table for table in [*found, _inference(out), _ranks(out)] if table and table.rows]


def spread(values: list[float], digits: int = 4) -> str:
    """Mean over the seeds, and the lowest and highest if they differ."""
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), mean(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _of(runs: Runs, group: str, index: int, key: str) -> list[float]:
    return [run["cells"][group][index][key] for run in runs]


def _cpu_seconds(run: dict[str, Any]) -> float:
    """Of all ranks, in training."""
    return run["cost"]["cpu_s_per_rank"] * run["cost"]["ranks"]


def _single(groups: dict[str, Runs]) -> Table:
    header = [
        "trained for",
        "network",
        "parameters",
        "best of 7",
        "5th percentile",
        "RZF start",
        "steps",
        "rate",
        "CPU s",
        "seeds",
    ]
    rows = []
    for runs in groups.values():
        config = runs[0]["config"]
        if len(config["users"]) == 1 and config["samples"] is None:
            figures = [spread(_of(runs, "trained", 0, key)) for key in ("of_best", "percentile_5", "of_rzf")]
            cost = [f"{config['steps']:,}", f"{config['rate']:g}", spread([_cpu_seconds(run) for run in runs], 0)]
            row = [
                f"K={config['users'][0]}, {config['snr_db'][0]:.0f} dB",
                config["network"],
                f"{runs[0]['parameters']:,}",
            ]
            rows.append([*row, *figures, *cost, str(len(runs))])
    rows.sort(key=lambda row: (row[0], -int(row[6].replace(",", "")), -float(row[3][:6])))
    return Table("One cell, N=8: mean rate as a fraction of WMMSE's", header, rows)


def _cell_name(scenario: dict[str, Any]) -> str:
    sizes = f"K={scenario['users']}, N={scenario['antennas']}"
    name = f"{sizes}, {scenario['snr_db'][0]:.0f} dB, {scenario['weights']} weights"
    return name + (f", correlation {scenario['correlation']}" if scenario["correlation"] else "")


def _mixed_runs(groups: dict[str, Runs]) -> Runs:
    return groups.get("mixed-upe-phase", [])


def _mixed(groups: dict[str, Runs]) -> Table:
    return _cells_table("One model, cells that it was trained for", _mixed_runs(groups), ["trained"])


def _generalisation(groups: dict[str, Runs]) -> Table:
    kinds = ["users", "antennas", "snr", "weights", "correlation"]
    return _cells_table(
        "The same model, other cells: only equal weights were in its training, in a third of the samples",
        _mixed_runs(groups),
        kinds,
    )


def _cells_table(title: str, runs: Runs, kinds: list[str]) -> Table:
    header = ["cell", "best of 7", "5th percentile", "RZF start", "best of 7, two passes", "best of 7, + 3 WMMSE"]
    rows = []
    for kind in kinds if runs else []:
        for index, cell in enumerate(runs[0]["cells"][kind]):
            keys = ("of_best", "percentile_5", "of_rzf", "two_passes_of_best", "refined_of_best")
            rows.append([_cell_name(cell["scenario"]), *(spread(_of(runs, kind, index, key)) for key in keys)])
    return Table(title, header, rows)


def _samples(groups: dict[str, Runs]) -> Table:
    rows = []
    for runs in groups.values():
        config = runs[0]["config"]
        if config["users"] == [4] and len(config["users"]) == 1:
            count = config["samples"]
            rows.append((config["network"], count or 10**9, spread(_of(runs, "trained", 0, "of_best")), len(runs)))
    text = [
        [name, f"{n:,}" if n < 10**9 else "fresh every step", ratio, str(seeds)]
        for name, n, ratio, seeds in sorted(rows)
    ]
    return Table("Training samples, K=4, N=8, 10 dB", ["network", "samples", "best of 7", "seeds"], text)


@dataclass
class _Target:
    what: str
    wanted: float
    group: str
    kind: str
    chosen: Callable[[dict[str, Any]], bool] = lambda scenario: True
    key: str = "of_best"


def _is(**wanted: Any) -> Callable[[dict[str, Any]], bool]:
    return lambda scenario: all(scenario[key] == value for key, value in wanted.items())


TARGETS = [
    _Target("K=8, 10 dB", 0.998, "k8-upe-phase", "trained"),
    _Target("one model, K 2 to 8, 0 to 20 dB: worst cell", 0.996, "mixed-upe-phase", "trained"),
    _Target("equal weights, K=8: worst cell", 0.993, "mixed-upe-phase", "weights", _is(weights="equal")),
    _Target("K=10, 12, 16, N=16: worst cell", 0.994, "mixed-upe-phase", "users", _is(antennas=16)),
    _Target("K=10, 12, 16, N=8: worst cell", 0.994, "mixed-upe-phase", "users", _is(antennas=8)),
    _Target("N=16, 32: worst cell", 0.994, "mixed-upe-phase", "antennas"),
    _Target("-5 and 25 dB: worst cell", 0.994, "mixed-upe-phase", "snr"),
    _Target("1,000 samples, K=4", 0.999, "few-upe-phase", "trained"),
    _Target(
        "network + 3 WMMSE iterations, K=8, 20 dB", 0.998, "mixed-upe-phase", "trained",
        _is(users=8, snr_db=[20.0, 20.0]), "refined_of_best",
    ),
]  # fmt: skip


def targets(groups: dict[str, Runs]) -> Table:
    """Each target, what each run reaches in one pass and in two, and what all runs need to meet it."""
    rows = []
    for target in TARGETS:
        runs = groups.get(target.group, [])
        once = [_worst(run, target, target.key) for run in runs]
        twice = [_worst(run, target, "two_passes_of_best") for run in runs] if target.key == "of_best" else []
        if once:
            each = ["" if None in worst else ", ".join(f"{w:.4f}" for w in worst) for worst in (once, twice)]
            met = next(
                (how for how, worst in (("one pass", once), ("two passes", twice)) if _meets(worst, target)), "no"
            )
            rows.append([target.what, f"{target.wanted}", *each, met])
    header = ["what", "at least", "one pass, each run", "two passes, each run", "met by all in"]
    return Table("Targets, against the best of 7 WMMSE starts", header, rows)


def _worst(run: dict[str, Any], target: _Target, key: str) -> float | None:
    """The lowest of the target's cells; None if this was not measured."""
    found = [cell.get(key) for cell in run["cells"][target.kind] if target.chosen(cell["scenario"])]
    return None if None in found else min(found)


def _meets(worst: list[float | None], target: _Target) -> bool:
    return bool(worst) and all(w is not None and w >= target.wanted for w in worst)


def _inference(out: Path) -> Table | None:
    path = out / "speed-inference.json"
    if not path.exists():
        return None
    figures = json.loads(path.read_text())
    small, large = figures["K=4"], figures["K=8"]
    rows = [
        [
            name,
            f"{small[name]['us']:.0f}",
            f"{large[name]['us']:.0f}",
            f"{small[name]['mflop']:.2f}",
            f"{large[name]['mflop']:.2f}",
        ]
        for name in small
    ]
    title = "Inference a sample: one thread, batch 256, N=8; WMMSE is the fast K x K form in complex128"
    return Table(title, ["", "K=4 us", "K=8 us", "K=4 Mflop", "K=8 Mflop"], rows)


_COSTS = {
    "ms_1_rank": "step on 1 rank, ms",
    "ms_2_ranks": "step on 2 ranks, ms",
    "speed_up": "1 rank / 2 ranks",
    "share_in_all_reduce": "share in all_reduce (waiting included)",
    "xccl_us": "bare all_reduce, xccl, us",
    "gloo_us": "bare all_reduce, gloo, us",
    "xccl_share_of_step": "beside gloo: share in all_reduce, xccl",
    "gloo_share_of_step": "beside gloo: share in all_reduce, gloo",
    "xccl_step_ms": "beside gloo: step with xccl, ms",
    "gloo_step_ms": "beside gloo: step with gloo, ms",
}


def _ranks(out: Path) -> Table | None:
    rows = []
    for name in ("ranks", "reduce"):
        path = out / f"speed-{name}.json"
        figures = json.loads(path.read_text()) if path.exists() else {}
        rows += [
            [_COSTS[key], *(f"{value[part]:.4g}" for part in ("median", "min", "max"))]
            for key, value in figures.items()
        ]
    return Table("Training step, K=8, batch 256, one BLAS thread a rank", ["", "median", "lowest", "highest"], rows)
