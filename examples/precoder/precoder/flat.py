"""All parameters of a network in one array, and all gradients in another: what is reduced, clipped and stepped."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def flatten(network: nn.Module, gradients: Tensor) -> nn.Parameter:
    """Moves the network's parameters into one array and their gradients into `gradients`; returns the former, as a
    parameter.

    `gradients` [number of parameters] may be memory that other ranks read.
    """
    parameters = list(network.parameters())
    values = torch.cat([p.detach().flatten() for p in parameters])
    offset = 0
    for parameter in parameters:
        piece = slice(offset, offset + parameter.numel())
        parameter.data = values[piece].view_as(parameter)
        parameter.grad = gradients[piece].view_as(parameter)
        offset = piece.stop
    flat = nn.Parameter(values)
    flat.grad = gradients
    return flat


def parameter_count(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in network.parameters())


def load_flat(network: nn.Module, values: Tensor) -> None:
    """Copies one array into the parameters of a network. Raises ValueError if the sizes differ."""
    if len(values) != parameter_count(network):
        raise ValueError(f"the network has {parameter_count(network)} parameters, the file {len(values)}")
    with torch.no_grad():
        pieces = values.split([p.numel() for p in network.parameters()])
        for parameter, piece in zip(network.parameters(), pieces, strict=True):
            parameter.copy_(piece.view_as(parameter))
