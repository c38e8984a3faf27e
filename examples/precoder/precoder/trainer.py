"""Data-parallel training: every rank computes the gradient of its part of the batch, all_reduce sums the parts.

Unsupervised: the loss is the negative rate itself. There are no labels and no WMMSE in training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import xccl
from precoder.channel import Channels, draw, generator
from precoder.config import TrainConfig
from precoder.flat import flatten, parameter_count
from precoder.rate import weighted_sum_rate
from precoder.registry import build

Reduce = Callable[[np.ndarray], Any]


@dataclass
class Cost:
    """Time spent in steps, on this rank: wall clock, CPU, and wall clock inside all_reduce (waiting included)."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    reduce_s: float = 0.0


class Trainer:
    """One rank's share of a training run. Collective: all ranks of `comm` make one with equal `config`, and step
    together.

    One seed gives one global batch, whatever the number of ranks; each rank keeps its slice of it. Parameters,
    optimizer and average are equal, to the bit, on all ranks, because all_reduce gives all ranks the same bits.
    """

    def __init__(self, config: TrainConfig, comm: xccl.Communicator, reduce: Reduce | None = None) -> None:
        if config.batch < comm.size:
            raise ValueError(f"a batch of {config.batch} cannot be cut over {comm.size} ranks")
        self.config = config
        self.comm = comm
        self.dtype = getattr(torch, config.precision)
        self.network = _seeded(config).to(self.dtype)
        # The gradients lie in symmetric memory: peers read them in place. The last element carries the loss along.
        self.shared = comm.zeros(parameter_count(self.network) + 1, config.precision)
        self.gradients = torch.from_numpy(self.shared)
        self.parameters = flatten(self.network, self.gradients[:-1])
        self.optimizer = torch.optim.Adam([self.parameters], fused=True)
        self.average = self.parameters.detach().clone()
        self.reduce = reduce or (lambda array: comm.all_reduce(array, out=array))
        self.step_index = 0
        self.cost = Cost()
        self._samples = _fixed_samples(config)

    def step(self) -> float:
        """One step on all ranks; returns the loss of the global batch, -mean(rate) / K."""
        began, began_cpu = time.perf_counter(), time.process_time()
        self.compute_gradient(self.step_index)
        self._update()
        self.step_index += 1
        self.cost.wall_s += time.perf_counter() - began
        self.cost.cpu_s += time.process_time() - began_cpu
        return float(self.shared[-1])

    def compute_gradient(self, step: int) -> None:
        """Fills `gradients` with the gradient of the global batch of `step`, and its last element with the loss."""
        everybody = self.global_batch(step)
        count, users = everybody.alpha.shape
        own = everybody.part(self.comm.rank, self.comm.size).to(self.dtype)
        self.gradients.zero_()
        # Divided by the global count: the sum over ranks is the mean, also if slices differ by a sample.
        loss = -weighted_sum_rate(self.network(own), own.alpha).sum() / (count * users)
        loss.backward()
        self.gradients[-1] = loss.detach()
        began = time.perf_counter()
        self.reduce(self.shared)
        self.cost.reduce_s += time.perf_counter() - began

    def global_batch(self, step: int) -> Channels:
        """The batch of one step: a function of the seed and the step, equal on all ranks."""
        rng = generator(self.config.seed, step)
        if self._samples is None:
            return draw(self.config.scenario(self.config.users_of(step)), self.config.batch, rng)
        chosen = self._samples[self.config.users_of(step)]
        index = torch.from_numpy(rng.integers(len(chosen.h), size=self.config.batch))
        return Channels(chosen.h[index], chosen.alpha[index])

    def _update(self) -> None:
        """Clip, Adam, average: the same arithmetic on every rank."""
        gradient = self.gradients[:-1]
        norm = float(gradient.norm())
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {self.step_index}: the gradient is not finite (loss {self.shared[-1]})")
        if norm > self.config.clip:
            gradient *= self.config.clip / norm
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.config, self.step_index)
        self.optimizer.step()
        # Short at first, so that the random start is forgotten.
        keep = min(self.config.average, (1 + self.step_index) / (10 + self.step_index))
        self.average.lerp_(self.parameters.detach(), 1 - keep)

    def state(self) -> dict[str, Any]:
        """All that a step changes."""
        return {
            "step": self.step_index,
            "parameters": self.parameters.detach(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "cost": vars(self.cost),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned, of a run with an equal configuration."""
        self.step_index = state["step"]
        with torch.no_grad():
            self.parameters.copy_(state["parameters"])
        self.average.copy_(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.cost = Cost(**state["cost"])

    def close(self) -> None:
        """Frees the symmetric memory. Collective."""
        self.comm.free(self.shared)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of one step: a linear rise, then a cosine."""
    rise = min(1.0, (step + 1) / config.warm_up)
    fall = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.rate * rise * (config.final_rate + (1 - config.final_rate) * fall)


def _seeded(config: TrainConfig) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build(config.network, config.antennas)


def _fixed_samples(config: TrainConfig) -> dict[int, Channels] | None:
    if config.samples is None:
        return None
    # Streams past the last step: no other batch of this seed has them.
    return {
        users: draw(config.scenario(users), config.samples, generator(config.seed, 2**40 + users))
        for users in sorted(set(config.users))
    }
