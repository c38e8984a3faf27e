"""Who attends and who holds experts, as the C core takes it: one configuration for each domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from xccl._binding import array_address, check, ffi, lib
from xccl.errors import XcclUsageError
from xccl.moe_config import BufferBytes, Quant, make_config

Path = Literal["auto", "direct", "trampoline"]

WHO = "AttentionExpert"
PATHS: dict[Path, int] = {
    "auto": lib.XCCL_PATH_AUTO,
    "direct": lib.XCCL_PATH_DIRECT,
    "trampoline": lib.XCCL_PATH_TRAMPOLINE,
}


@dataclass(frozen=True)
class Domain:
    """Attention ranks that send together, and the configuration of their exchange with the experts."""

    attention_ranks: NDArray[np.int32]
    config: Any

    def pointer(self) -> Any:
        """int32_t * to the attention ranks."""
        return _int32s(self.attention_ranks)


@dataclass(frozen=True)
class Roles:
    """All domains, and the expert ranks.

    Attributes
    ----------
    expert_ranks : int32 [E]
        Ascending.
    owner : int32 [num_experts]
        Index into expert_ranks.
    """

    domains: tuple[Domain, ...]
    expert_ranks: NDArray[np.int32]
    owner: NDArray[np.int32]

    def experts_pointer(self) -> Any:
        """int32_t * to the expert ranks."""
        return _int32s(self.expert_ranks)

    def owner_pointer(self) -> Any:
        """int32_t * to the owners."""
        return _int32s(self.owner)

    def buffer_bytes(self) -> BufferBytes:
        """Bytes of all domains."""
        out, total = ffi.new("xccl_moe_bytes_t *"), np.zeros(3, object)
        for domain in self.domains:
            check(lib.xccl_ae_bytes(domain.config, self.owner_pointer(), out))
            total += (int(out.metadata), int(out.staging), int(out.pool))
        return BufferBytes(*total)


def make_roles(
    attention_ranks: Sequence[int] | Sequence[Sequence[int]],
    expert_ranks: Sequence[int],
    num_experts: int,
    hidden: int,
    num_topk: int,
    num_max_tokens_per_rank: int,
    dtype: DTypeLike,
    quant: Quant,
    expert_map: ArrayLike | None,
    path: Path,
) -> Roles:
    """Checks who is where; the C core checks the numbers."""
    experts = _ranks("expert_ranks", expert_ranks)
    domains = [_ranks("attention_ranks", ranks) for ranks in _as_domains(attention_ranks)]
    everybody = np.concatenate([*domains, experts])
    rank, times = np.unique(everybody, return_counts=True)
    if (times > 1).any():
        raise XcclUsageError(
            f"{WHO}: rank {rank[times > 1][0]} is named twice in attention_ranks and expert_ranks, expected once"
        )
    if path not in PATHS:
        raise XcclUsageError(f"{WHO}: path is {path!r}, expected 'auto', 'direct' or 'trampoline'")
    places = _places(expert_map, num_experts, experts)
    layer, owner = make_config(
        len(experts), num_experts, hidden, num_topk, num_max_tokens_per_rank, dtype, quant, places, who=WHO
    )
    configs, before = [], 0
    for ranks in domains:
        config = ffi.new("xccl_ae_config_t *")
        config.layer, config.path = layer[0], PATHS[path]
        config.num_attention_ranks, config.num_expert_ranks = len(ranks), len(experts)
        config.first_trampoline = before % len(experts)
        before += len(ranks)
        configs.append(Domain(ranks, config))
    return Roles(tuple(configs), experts, owner)


def _as_domains(ranks: Any) -> list[Any]:
    """A list of ranks is one domain."""
    given = list(ranks) if np.iterable(ranks) else [ranks]
    nested = [np.iterable(part) for part in given]
    if any(nested) and not all(nested):
        raise XcclUsageError(f"{WHO}: attention_ranks is {ranks!r}, expected ranks or lists of ranks, one a domain")
    return given if any(nested) else [given]


def _ranks(name: str, ranks: Any) -> NDArray[np.int32]:
    """Ranks, ascending."""
    given = np.asarray(list(ranks) if np.iterable(ranks) else ranks)
    if given.ndim != 1 or given.size == 0 or given.dtype.kind not in "iu":
        raise XcclUsageError(f"{WHO}: {name} is {ranks!r}, expected at least one rank, as integers")
    if (abs(given) > np.iinfo(np.int32).max).any():
        raise XcclUsageError(f"{WHO}: {name} is {ranks!r}, expected ranks of the communicator")
    return np.sort(given).astype(np.int32)


def _places(expert_map: ArrayLike | None, num_experts: int, experts: NDArray[np.int32]) -> ArrayLike | None:
    """The map with the index of each rank among the expert ranks."""
    if expert_map is None:
        return None
    ranks = np.asarray(expert_map)
    if ranks.shape != (num_experts,) or ranks.dtype.kind not in "iu":
        return ranks  # make_config says what is wrong
    wrong = np.flatnonzero(~np.isin(ranks, experts))
    if len(wrong):
        raise XcclUsageError(
            f"{WHO}: expert_map[{wrong[0]}] is {ranks[wrong[0]]}, expected one of expert_ranks {experts.tolist()}"
        )
    return np.searchsorted(experts, ranks)


def _int32s(a: NDArray[np.int32]) -> Any:
    return ffi.cast("int32_t *", array_address(a))
