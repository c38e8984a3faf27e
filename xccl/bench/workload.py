"""Which experts the tokens of a MoE layer choose: named workloads, the same for the same seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xccl.reference import default_expert_map

Slots = NDArray[np.int64]

WORKLOADS = {
    "uniform": "every expert is as likely",
    "zipf": "the n-th most popular expert has 1/n of the most popular one's share",
    "hot-expert": "every token chooses one expert, and others evenly",
    "hot-rank": "experts of rank 0 are ten times as likely",
    "empty-rank": "the last rank has no tokens, and its experts get none",
    "rotating": "as hot-expert, with another hot one in each set of arrays",
}
_HOT_RANK_FACTOR = 10


@dataclass(frozen=True)
class Shape:
    """A MoE layer."""

    hidden: int
    num_topk: int
    num_experts: int


SHAPES = {"deepseek": Shape(7168, 8, 256), "qwen3": Shape(2048, 8, 128)}


def choose_experts(
    name: str, seed: int, buffer: int, ranks: int, tokens: int, shape: Shape, owners: int | None = None
) -> list[Slots]:
    """topk_idx [tokens, num_topk] of each rank, for one set of arrays. No token names an expert twice.

    The experts are spread over `owners` ranks, by default those that have the tokens.
    """
    rng = np.random.default_rng((seed, buffer))
    owners = owners or ranks
    owner = default_expert_map(shape.num_experts, owners)
    share = np.ones(shape.num_experts)
    if name == "zipf":
        # popularity belongs to the seed, not to the set of arrays
        share = np.random.default_rng(seed).permutation(1 / np.arange(1, shape.num_experts + 1))
    elif name == "hot-expert":
        share[seed % shape.num_experts] = np.inf
    elif name == "rotating":
        share[(seed + buffer * max(1, shape.num_experts // owners)) % shape.num_experts] = np.inf
    elif name == "hot-rank":
        share[owner == 0] = _HOT_RANK_FACTOR
    elif name == "empty-rank" and owners > 1:
        share[owner == owners - 1] = 0
    counts = [tokens] * ranks
    if name == "empty-rank" and ranks > 1:
        counts[-1] = 0
    return [_sample(rng, share, count, shape.num_topk) for count in counts]


def _sample(rng: np.random.Generator, share: NDArray[np.float64], tokens: int, num_topk: int) -> Slots:
    """Draws without replacement in proportion to the shares: the largest of log share + Gumbel noise."""
    with np.errstate(divide="ignore"):
        keys = np.log(share) + rng.gumbel(size=(tokens, share.size))
    return np.ascontiguousarray(np.argsort(-keys, axis=1)[:, :num_topk], dtype=np.int64)


def chosen_rows(topk_idx: list[Slots], num_experts: int, owners: int | None = None) -> NDArray[np.int64]:
    """Rows [source, destination] that dispatch delivers: one for each token and expert."""
    owners = owners or len(topk_idx)
    owner = default_expert_map(num_experts, owners)
    return np.array([np.bincount(owner[idx.ravel()], minlength=owners) for idx in topk_idx], np.int64)


def received_rows(topk_idx: list[Slots], num_experts: int, owners: int | None = None) -> NDArray[np.int64]:
    """Rows that each rank with experts receives."""
    return np.asarray(chosen_rows(topk_idx, num_experts, owners).sum(axis=0))


def moved_rows(topk_idx: list[Slots], num_experts: int, owners: int | None = None) -> NDArray[np.int64]:
    """Rows [source, destination] that must move: a token goes to a rank once, however many of its experts are there."""
    owners = owners or len(topk_idx)
    owner = default_expert_map(num_experts, owners)
    return np.array([[(owner[idx] == rank).any(axis=1).sum() for rank in range(owners)] for idx in topk_idx], np.int64)
