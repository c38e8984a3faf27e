"""What it costs: steps on 2 ranks against 1, all_reduce against gloo's, inference against WMMSE.

Runs to be compared are interleaved, and each figure is a median with its spread: a machine is rarely as quiet as one
thinks.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import xccl
from precoder.config import TASKS

ROUNDS = 7
STEPS = 12
WARM_UP_STEPS = 4


def ranks(out: Path) -> int:
    """Time of a step of task k8 (K=8, batch 256) on 1 and on 2 ranks, in turns."""
    times: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for count, results in times.items():
            per_rank = xccl.run(_time_steps, count)
            results.append(max(per_rank))  # the slowest rank's
    ratios = [one / two for (one, _), (two, _) in zip(times[1], times[2], strict=True)]
    figures = {
        "ms_1_rank": _spread([1e3 * step for step, _ in times[1]]),
        "ms_2_ranks": _spread([1e3 * step for step, _ in times[2]]),
        "speed_up": _spread(ratios),
        "share_in_all_reduce": _spread([share for _, share in times[2]]),
    }
    return _write(out, "ranks", figures)


def _time_steps(comm: xccl.Communicator) -> tuple[float, float]:
    """Seconds a step, and the share of them in all_reduce, of this rank."""
    from precoder.train import settled_process
    from precoder.trainer import Cost, Trainer

    with settled_process():
        trainer = Trainer(TASKS["k8"], comm)
        for _ in range(WARM_UP_STEPS):
            trainer.step()
        trainer.cost = Cost()
        comm.barrier()
        for _ in range(STEPS):
            trainer.step()
        trainer.close()
    return trainer.cost.wall_s / STEPS, trainer.cost.reduce_s / trainer.cost.wall_s


def reduce(out: Path) -> int:
    """all_reduce of the gradients by xccl and by gloo, on 2 ranks: bare, and as the share of a training step."""
    with tempfile.TemporaryDirectory() as folder:
        rounds = xccl.run(_compare_reduce, 2, folder)
    slowest = {key: [max(pair) for pair in zip(*(r[key] for r in rounds), strict=True)] for key in rounds[0]}
    return _write(out, "reduce", {key: _spread(values) for key, values in slowest.items()})


def _compare_reduce(comm: xccl.Communicator, folder: str) -> dict[str, list[float]]:
    from precoder.train import settled_process
    from precoder.trainer import Cost, Trainer

    figures: dict[str, list[float]] = {}
    with settled_process():
        gloo = _gloo(comm, folder)
        trainer = Trainer(TASKS["k8"], comm)
        ways = {"xccl": trainer.reduce, "gloo": gloo}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                figures.setdefault(f"{name}_us", []).append(1e6 * _time_calls(comm, way, trainer.shared))
            for name, way in ways.items():
                trainer.reduce, trainer.cost = way, Cost()
                comm.barrier()
                for _ in range(STEPS):
                    trainer.step()
                figures.setdefault(f"{name}_share_of_step", []).append(trainer.cost.reduce_s / trainer.cost.wall_s)
                figures.setdefault(f"{name}_step_ms", []).append(1e3 * trainer.cost.wall_s / STEPS)
        trainer.close()
    return figures


def _gloo(comm: xccl.Communicator, folder: str) -> Callable[[np.ndarray], Any]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=comm.rank, world_size=comm.size)
    return lambda array: dist.all_reduce(torch.from_numpy(array))


def _time_calls(
    comm: xccl.Communicator, call: Callable[[np.ndarray], Any], array: np.ndarray, calls: int = 50
) -> float:
    array[:] = 0  # sums of sums would overflow
    for _ in range(5):
        call(array)
    comm.barrier()
    began = time.perf_counter()
    for _ in range(calls):
        call(array)
    return (time.perf_counter() - began) / calls


def inference(out: Path) -> int:
    """Time and FLOPs a sample on one thread, batch 256, N=8: networks, and this project's K x K WMMSE in complex128."""
    from precoder.inference import measure

    return _write(out, "inference", measure())


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def _write(out: Path, name: str, figures: dict[str, Any]) -> int:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"speed-{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    for key, value in figures.items():
        sys.stdout.write(f"{key:28} {value}\n")
    return 0


PARTS = {"ranks": ranks, "reduce": reduce, "inference": inference}
