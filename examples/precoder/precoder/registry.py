"""The networks by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from precoder.baselines import EdgeGNN, GraphTransformer, ModelGNN
from precoder.networks import GramNetwork, LiteralLayer, PhaseLayer, PlainLayer

_BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    "upe-phase": lambda antennas: GramNetwork(PhaseLayer),
    "upe": lambda antennas: GramNetwork(PlainLayer),
    "upe-literal": lambda antennas: GramNetwork(LiteralLayer),
    "edge-gnn": lambda antennas: EdgeGNN(),
    "model-gnn": lambda antennas: ModelGNN(),
    "transformer": GraphTransformer,
}


def names() -> list[str]:
    """All names of networks."""
    return list(_BUILDERS)


def build(name: str, antennas: int) -> nn.Module:
    """A new network with random parameters; `antennas` matters to the transformer only.

    Raises ValueError for an unknown name.
    """
    if name not in _BUILDERS:
        raise ValueError(f"a network is one of {', '.join(names())}, got {name!r}")
    return _BUILDERS[name](antennas)
