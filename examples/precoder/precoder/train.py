"""The training loop of one rank: steps, progress bar, checkpoints."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import xccl
from precoder import checkpoint
from precoder.config import TrainConfig
from precoder.trainer import Trainer

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@contextmanager
def settled_process() -> Iterator[None]:
    """Inside: one BLAS thread a rank; no denormals; memory that a step frees stays mapped for the next one.

    The last saves page faults, a tenth of a step: glibc would hand arrays of megabytes back to the system each time.
    It stays so afterwards; threads and denormals, which change what others compute in the process, are put back.
    """
    threads, flushed = torch.get_num_threads(), _denormals_are_flushed()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have no mallopt
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        mallopt(M_MMAP_THRESHOLD, 1 << 25)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushed)


def _denormals_are_flushed() -> bool:
    """PyTorch sets this mode of the processor, but does not tell it."""
    return sys.float_info.min / 2 == 0


@settled_process()
def train(
    comm: xccl.Communicator, config: TrainConfig, out: Path, *, resume: bool = False, every: int = 500
) -> dict[str, Any]:
    """Trains, and writes `out`/checkpoint.pt every `every` steps and `out`/model.pt at the end. Collective.

    With `resume` it goes on from the checkpoint, to the bit as without the interruption. Returns the cost of the run.
    Raises ValueError if the checkpoint is of another configuration.
    """
    trainer = Trainer(config, comm)
    losses: list[float] = []
    if resume:
        losses = _resume(trainer, out)
    with _Bar(comm, config, trainer.step_index) as bar:
        while trainer.step_index < config.steps:
            losses.append(trainer.step())
            bar.advance(losses)
            if trainer.step_index % every == 0 or trainer.step_index == config.steps:
                _save(trainer, losses, out)
    cost = _cost(trainer)
    if comm.rank == 0:
        content = {"config": config.to_json(), "parameters": trainer.average.float(), "cost": cost}
        checkpoint.write(out / checkpoint.MODEL, content)
    trainer.close()
    return cost


def _save(trainer: Trainer, losses: list[float], out: Path) -> None:
    if trainer.comm.rank == 0:
        content = {"config": trainer.config.to_json(), "ranks": trainer.comm.size, "losses": losses, **trainer.state()}
        checkpoint.write(out / checkpoint.CHECKPOINT, content)


def _resume(trainer: Trainer, out: Path) -> list[float]:
    content = checkpoint.read(out / checkpoint.CHECKPOINT)
    saved = TrainConfig(**content["config"])
    if differences := trainer.config.differences(saved):
        raise ValueError(f"{out} was trained with other settings (now, then): {'; '.join(differences)}")
    trainer.restore(content)
    return list(content["losses"])


def _cost(trainer: Trainer) -> dict[str, Any]:
    cost = trainer.cost
    return {
        "ranks": trainer.comm.size,
        "steps": trainer.step_index,
        "wall_s": cost.wall_s,
        "cpu_s_per_rank": cost.cpu_s,
        "share_in_all_reduce": cost.reduce_s / cost.wall_s if cost.wall_s else 0.0,
    }


class _Bar:
    """Rank 0's progress: a bar on a terminal, a line for each tenth elsewhere, nothing on other ranks."""

    def __init__(self, comm: xccl.Communicator, config: TrainConfig, done: int) -> None:
        self.shown = comm.rank == 0
        self.console = Console(stderr=True)
        self.steps = config.steps
        self.tenth = max(1, config.steps // 10)
        self.cycle = len(config.users)
        self.began, self.first = time.monotonic(), done
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self.progress = Progress(*columns, TimeRemainingColumn(), console=self.console, disable=not self._live())
        name = f"{config.network}, {comm.size} rank{'s' if comm.size > 1 else ''}"
        self.task = self.progress.add_task(name, total=config.steps, completed=done, text="")

    def _live(self) -> bool:
        return self.shown and self.console.is_terminal

    def advance(self, losses: list[float]) -> None:
        """Tells of one more step; the rate shown is the mean over the last cycle of K."""
        if not self.shown:
            return
        done = len(losses)
        recent = losses[-self.cycle :]
        text = f"{-sum(recent) / len(recent):.4f} bit/s/Hz a user"
        if self._live():
            self.progress.update(self.task, completed=done, text=text)
        elif done % self.tenth == 0:
            pace = (time.monotonic() - self.began) / (done - self.first)
            sys.stderr.write(f"step {done}/{self.steps}  {text}  {1e3 * pace:.1f} ms a step\n")
            sys.stderr.flush()

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()
