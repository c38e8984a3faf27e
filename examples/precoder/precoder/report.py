"""Evaluates all finished runs, prints the tables, and draws the plots."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from precoder import plots, tables
from precoder.checkpoint import MODEL, read_model
from precoder.evaluate import cells, evaluate
from precoder.flat import load_flat, parameter_count
from precoder.registry import build

FIGURES = "figures.json"


def report(runs: Path, out: Path, count: int) -> int:
    """Evaluates each run in the folder `runs` that has changed; writes figures.json, tables.md and plots to `out`.

    Runs in figures.json of which there is no folder any more stay in the tables.
    """
    path = out / FIGURES
    figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    folders = sorted(model.parent for model in runs.glob(f"*/{MODEL}"))
    if not folders and not figures:
        raise FileNotFoundError(f"no finished run in {runs}: python -m precoder train -n 2")
    out.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        stamp = [int((folder / MODEL).stat().st_mtime), count]
        if figures.get(folder.name, {}).get("stamp") != stamp:
            figures[folder.name] = {"stamp": stamp, **_evaluate_run(folder, count, runs / "wmmse")}
            path.write_text(json.dumps(figures, indent=1) + "\n")
    groups = _seeds_together(figures)
    written = tables.build(groups, out)
    (out / "tables.md").write_text("\n\n".join(table.markdown() for table in written) + "\n")
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in written:
        console.print(table.rich())
    plots.draw(groups, out)
    return 0


def _evaluate_run(folder: Path, count: int, cache: Path) -> dict[str, Any]:
    config, parameters, cost = read_model(folder)
    network = build(config.network, config.antennas)
    load_flat(network, parameters)
    groups = cells(config)
    console = Console(stderr=True)
    jobs = [(group, scenario) for group, scenarios in groups.items() for scenario in scenarios]
    results: dict[str, list[Any]] = {group: [] for group in groups}
    for group, scenario in track(jobs, f"evaluating {folder.name}", console=console, disable=not console.is_terminal):
        results[group].append(evaluate(network, scenario, count, cache))
    return {
        "config": config.to_json(),
        "cost": cost,
        "parameters": parameter_count(network),
        "cells": results,
    }


def _seeds_together(figures: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Runs by name without the seed, and without the number of ranks in names like mixed-upe-phase-0-on-2."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, run in sorted(figures.items()):
        groups.setdefault(re.sub(r"-\d+(-on-\d+)?$", "", name), []).append(run)
    return groups
