"""Muon (Jordan et al., 2024): momentum, then each matrix's update is brought near an orthogonal matrix."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

# Coefficients of the quintic iteration from the Muon reference implementation.
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration on matrices [n, rows, columns]: singular values go near 1."""
    x = matrices.bfloat16()
    wide = x.shape[-2] > x.shape[-1]
    if wide:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = A * x + (B * gram + C * gram @ gram) @ x
    return (x.mT if wide else x).float()


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for parameters [..., in, out], where leading dimensions count matrices."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            # Equal shapes are stacked: one batched product instead of many small ones.
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape[-2:]].append(parameter)
            for shape, parameters in by_shape.items():
                self._step_shape(parameters, shape, group["lr"], group["momentum"])

    def _step_shape(self, parameters: list[Tensor], shape: torch.Size, lr: float, momentum: float) -> None:
        updates = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            average = state["momentum"].lerp_(parameter.grad, 1 - momentum)
            updates.append(torch.lerp(parameter.grad, average, momentum).reshape(-1, *shape))
        update = orthogonalize(torch.cat(updates)) * max(1.0, shape[1] / shape[0]) ** 0.5
        for parameter, part in zip(parameters, update.split([u.shape[0] for u in updates]), strict=True):
            parameter.sub_(part.view_as(parameter), alpha=lr)
