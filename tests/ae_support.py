"""Random A2E and E2A, compared with xccl.reference bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from moe_support import Layer, expert_outputs, random_inputs

import xccl
from xccl import reference

SHAPES = [(1, 1), (1, 4), (2, 3), (3, 2), (4, 1), (5, 9)]  # attention : expert ranks


@dataclass(frozen=True)
class Roles:
    """Who attends, by domain, and who holds experts."""

    domains: list[list[int]]
    expert_ranks: list[int]

    def open(self, comm: xccl.Communicator, layer: Layer, path: str) -> xccl.AttentionExpert:
        """`layer` has the index of an expert rank in its expert_map."""
        ranks = None if layer.expert_map is None else np.array(self.expert_ranks)[layer.expert_map]
        return xccl.AttentionExpert(
            comm, self.domains, self.expert_ranks, layer.num_experts, layer.hidden, layer.num_topk, layer.max_tokens,
            layer.dtype, layer.quant, ranks, path=path,
        )  # fmt: skip


def random_roles(rng: np.random.Generator, size: int, num_attention: int, num_experts: int, num_domains: int) -> Roles:
    """Roles scattered over the ranks; those left over have none."""
    ranks = rng.permutation(size).tolist()
    attention = ranks[:num_attention]
    cuts = np.sort(rng.choice(np.arange(1, num_attention), num_domains - 1, replace=False)).tolist()
    domains = [attention[a:b] for a, b in zip([0, *cuts], [*cuts, num_attention], strict=True)]
    return Roles([sorted(domain) for domain in domains], sorted(ranks[num_attention : num_attention + num_experts]))


@dataclass
class MicroBatch:
    """What the attention ranks of a domain send, what must arrive, and what must come back."""

    layer: Layer
    num_expert_ranks: int
    xs: list[np.ndarray]
    idxs: list[np.ndarray]
    weights: list[np.ndarray]
    received: list[reference.Received] = field(init=False)
    ys: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.received = self.arrive(True)
        self.ys = [expert_outputs(r, self.layer) for r in self.received]

    def arrive(self, dequantize: bool) -> list[reference.Received]:
        layer = self.layer
        return reference.a2e(
            self.xs, self.idxs, layer.num_experts, self.num_expert_ranks, expert_map=layer.expert_map,
            quant=layer.quant, dequantize=dequantize,
        )  # fmt: skip

    def outs(self, weighted: bool = True) -> list[np.ndarray]:
        weights = self.weights if weighted else None
        return reference.e2a(self.ys, self.idxs, self.layer.num_experts, weights, expert_map=self.layer.expert_map)


def random_micro_batch(rng: np.random.Generator, layer: Layer, roles: Roles, domain: int) -> MicroBatch:
    inputs = random_inputs(rng, layer, len(roles.domains[domain]))
    return MicroBatch(layer, len(roles.expert_ranks), *inputs)
