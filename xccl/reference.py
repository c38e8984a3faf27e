"""The MoE operations in plain NumPy: the oracle that ExpertParallel and AttentionExpert agree with bit for bit.

Nothing here communicates. A list has one entry for each rank: what the rank would pass, or what it would get::

    received = reference.dispatch([x0, x1], [topk_idx0, topk_idx1], num_experts=8, quant="int8")
    ys = [expert(r.recv_x, r.num_recv_tokens_per_expert) for r in received]
    outs = reference.combine(ys, [topk_idx0, topk_idx1], 8, [topk_weights0, topk_weights1])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from xccl.errors import XcclMissingExperts

Array = NDArray[Any]


@dataclass(frozen=True)
class Received:
    """What one rank gets from a dispatch. Rows are sorted by (local expert, source rank, token, slot).

    Attributes
    ----------
    recv_x : [num_recv, hidden]
        Of the dtype that was sent; int8 after ``dequantize=False``.
    scales : float32 [num_recv]
        After ``dequantize=False``, else None.
    num_recv_tokens_per_expert : int32 [num_local_experts]
    src_rank, src_token, src_slot : int32 [num_recv]
        Where each row comes from; slot: column of topk_idx.
    """

    recv_x: Array
    scales: NDArray[np.float32] | None
    num_recv_tokens_per_expert: NDArray[np.int32]
    src_rank: NDArray[np.int32]
    src_token: NDArray[np.int32]
    src_slot: NDArray[np.int32]


def default_expert_map(num_experts: int, num_ranks: int) -> NDArray[np.int32]:
    """The rank of each expert, int32 [num_experts]: contiguous blocks within 1 in size, larger first."""
    size, larger = divmod(num_experts, num_ranks)
    sizes = [size + (rank < larger) for rank in range(num_ranks)]
    return np.repeat(np.arange(num_ranks, dtype=np.int32), sizes)


def quantize(x: Array) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Rows of x [n, hidden] as int8 and one float32 scale [n] a row, which is max|row| / 127.

    A row whose scale is below the smallest normal float32 becomes zeros with scale 0, one that holds an
    infinity or a NaN becomes zeros with scale NaN.
    """
    wide = x.astype(np.float32)
    largest = np.abs(wide).max(axis=1, initial=0)
    scales = largest / np.float32(127)
    scales[scales < np.finfo(np.float32).tiny] = 0
    scales[~np.isfinite(largest)] = np.nan
    usable = scales > 0
    q = np.zeros(x.shape, np.int8)
    inverse = np.float32(1) / scales[usable, None]
    q[usable] = np.clip(np.rint(wide[usable] * inverse), -127, 127).astype(np.int8)
    return q, scales


def dequantize(q: NDArray[np.int8], scales: NDArray[np.float32], dtype: DTypeLike) -> Array:
    """Rows q * scale, multiplied in float32, rounded to dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (q.astype(np.float32) * scales[:, None]).astype(dtype)


def dispatch(
    xs: Sequence[Array],
    topk_idxs: Sequence[ArrayLike],
    num_experts: int,
    *,
    expert_map: ArrayLike | None = None,
    alive: ArrayLike | None = None,
    quant: str | None = None,
    dequantize: bool = True,
) -> list[Received]:
    """Sends each token to the ranks of its experts; one Received for each rank.

    xs[rank]: [num_tokens, hidden]; topk_idxs[rank]: [num_tokens, num_topk], -1 for no expert. A token that
    names an expert twice arrives there twice. Experts whose rank is not ``alive`` (bool [ranks]), or that have none
    (-1 in expert_map), get nothing. With ``quant="int8"`` rows pass through `quantize`.
    """
    owner = _owner(num_experts, len(xs), expert_map)
    return _deliver(xs, topk_idxs, owner, _live(owner, alive), len(xs), quant, dequantize)


def a2e(
    xs: Sequence[Array],
    topk_idxs: Sequence[ArrayLike],
    num_experts: int,
    num_expert_ranks: int,
    *,
    expert_map: ArrayLike | None = None,
    quant: str | None = None,
    dequantize: bool = True,
) -> list[Received]:
    """As `dispatch`, from attention ranks to expert ranks that are others; one Received for each expert rank.

    xs and topk_idxs have one entry for each attention rank of a domain, in ascending order. Ranks are counted among
    their like: expert_map and the result say which expert rank, src_rank which attention rank.
    """
    owner = _owner(num_experts, num_expert_ranks, expert_map)
    return _deliver(xs, topk_idxs, owner, owner, num_expert_ranks, quant, dequantize)


def _deliver(
    xs: Sequence[Array],
    topk_idxs: Sequence[ArrayLike],
    owner: NDArray[np.int32],
    live: NDArray[np.int32],
    num_owners: int,
    quant: str | None,
    dequantize: bool,
) -> list[Received]:
    """What each owner gets; `live` is owner with -1 for those that get nothing."""
    rows = _rows([np.asarray(idx) for idx in topk_idxs], live)
    received = []
    for rank in range(num_owners):
        mine = rows[rows["owner"] == rank]
        recv_x = np.zeros((len(mine), xs[0].shape[1]), xs[0].dtype)
        for i, row in enumerate(mine):
            recv_x[i] = xs[row["src_rank"]][row["token"]]
        scales = None
        if quant is not None:
            recv_x, scales = _through_int8(recv_x, dequantize)
        counts = [np.count_nonzero(mine["expert"] == e) for e in np.flatnonzero(owner == rank)]
        received.append(
            Received(
                recv_x=recv_x,
                scales=scales,
                num_recv_tokens_per_expert=np.array(counts, np.int32),
                src_rank=mine["src_rank"].astype(np.int32),
                src_token=mine["token"].astype(np.int32),
                src_slot=mine["slot"].astype(np.int32),
            )
        )
    return received


def combine(
    ys: Sequence[Array],
    topk_idxs: Sequence[ArrayLike],
    num_experts: int,
    topk_weights: Sequence[ArrayLike] | None = None,
    *,
    expert_map: ArrayLike | None = None,
    alive: ArrayLike | None = None,
    on_missing: str = "raise",
) -> list[Array]:
    """Sums the expert outputs of each token; [num_tokens, hidden] for each rank, in the dtype of ys.

    ys[rank]: [num_recv, hidden], in the order in which `dispatch` delivered the rows to this rank. The sum is
    weighted by topk_weights[rank] ([num_tokens, num_topk]) if given; it runs in float32 over the slots in
    ascending order, multiplication and addition rounded apart, and is rounded once at the end. A token
    without experts gives zeros. `on_missing` is about experts without a live rank, as in ExpertParallel.combine:
    "raise" (XcclMissingExperts), "renormalize" or "zero".
    """
    idxs = [np.asarray(idx) for idx in topk_idxs]
    live = _live(_owner(num_experts, len(ys), expert_map), alive)
    if on_missing == "raise":
        _require_all(idxs, live)
    elif on_missing == "renormalize":
        weights = [None] * len(idxs) if topk_weights is None else [np.asarray(w, np.float32) for w in topk_weights]
        topk_weights = [_renormalize(idx, w, live) for idx, w in zip(idxs, weights, strict=True)]
    rows = _rows(idxs, live)
    sums = [np.zeros((len(idx), ys[0].shape[1]), np.float32) for idx in idxs]
    with np.errstate(over="ignore", invalid="ignore"):
        contributions = np.concatenate([y.astype(np.float32) for y in ys])
        for i in np.argsort(rows["slot"], kind="stable"):
            _, _, source, token, slot = rows[i]
            term = contributions[i]
            if topk_weights is not None:
                term = np.asarray(topk_weights[source], np.float32)[token, slot] * term
            sums[source][token] += term
        return [total.astype(ys[0].dtype) for total in sums]


def e2a(
    ys: Sequence[Array],
    topk_idxs: Sequence[ArrayLike],
    num_experts: int,
    topk_weights: Sequence[ArrayLike] | None = None,
    *,
    expert_map: ArrayLike | None = None,
) -> list[Array]:
    """As `combine`, from expert ranks to attention ranks: ys of the former, the rest and the result of the latter."""
    return combine(ys, topk_idxs, num_experts, topk_weights, expert_map=expert_map)


def missing_weights(
    topk_idxs: Sequence[ArrayLike],
    num_experts: int,
    topk_weights: Sequence[ArrayLike] | None = None,
    *,
    expert_map: ArrayLike | None = None,
    alive: ArrayLike | None = None,
) -> list[NDArray[np.float32]]:
    """Weight of each token's experts without a live rank: float32 [num_tokens] for each rank.

    Summed in float32 over the slots in ascending order; without topk_weights each slot weighs 1.
    """
    idxs = [np.asarray(idx) for idx in topk_idxs]
    live = _live(_owner(num_experts, len(idxs), expert_map), alive)
    weights = [np.ones(idx.shape, np.float32) for idx in idxs] if topk_weights is None else topk_weights
    return [_sum_slots(np.asarray(w, np.float32), _missing(i, live)) for i, w in zip(idxs, weights, strict=True)]


def tokens_without_expert(
    topk_idxs: Sequence[ArrayLike],
    num_experts: int,
    *,
    expert_map: ArrayLike | None = None,
    alive: ArrayLike | None = None,
) -> list[NDArray[np.int64]]:
    """Tokens of each rank that chose experts none of which has a live rank, ascending."""
    idxs = [np.asarray(idx) for idx in topk_idxs]
    live = _live(_owner(num_experts, len(idxs), expert_map), alive)
    missing = [_missing(idx, live) for idx in idxs]
    return [
        np.flatnonzero(lost.any(axis=1) & (lost | (idx < 0)).all(axis=1))
        for idx, lost in zip(idxs, missing, strict=True)
    ]


_ROW = np.dtype([(name, np.int64) for name in ("owner", "expert", "src_rank", "token", "slot")])


def _owner(num_experts: int, num_ranks: int, expert_map: ArrayLike | None) -> NDArray[np.int32]:
    if expert_map is None:
        return default_expert_map(num_experts, num_ranks)
    return np.asarray(expert_map, np.int32)


def _live(owner: NDArray[np.int32], alive: ArrayLike | None) -> NDArray[np.int32]:
    """The owner of each expert if it is alive, else -1."""
    if alive is None:
        return owner
    return np.where((owner >= 0) & np.asarray(alive, np.bool_)[owner], owner, np.int32(-1))


def _missing(idx: Array, live: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Slots that name an expert without a live rank."""
    return np.asarray((idx >= 0) & (live[idx] < 0))


def _sum_slots(weights: NDArray[np.float32], where: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Of each token, over some of its slots in ascending order, in float32."""
    total = np.zeros(len(weights), np.float32)
    for slot in range(weights.shape[1]):
        total[where[:, slot]] += weights[where[:, slot], slot]
    return total


def _require_all(idxs: Sequence[Array], live: NDArray[np.int32]) -> None:
    for rank, idx in enumerate(idxs):
        tokens = np.flatnonzero(_missing(idx, live).any(axis=1)).tolist()
        if tokens:
            raise XcclMissingExperts(f"combine: token {tokens[0]} of rank {rank} misses an expert", tuple(tokens))


def _renormalize(idx: Array, weights: NDArray[np.float32] | None, live: NDArray[np.int32]) -> NDArray[np.float32]:
    """Weights whose live part of each token weighs as much as all of it did, where that can be."""
    if weights is None:
        weights = np.ones(idx.shape, np.float32)
    chosen, missing = idx >= 0, _missing(idx, live)
    with np.errstate(all="ignore"):
        kept, total = _sum_slots(weights, chosen & ~missing), _sum_slots(weights, chosen)
        ordinary = ((weights >= 0) | ~chosen).all(axis=1)
        scaled = missing.any(axis=1) & ordinary & (kept > 0) & np.isfinite(total)
        return np.where(scaled[:, None], weights / kept[:, None] * total[:, None], weights)


def _rows(topk_idxs: Sequence[Array], owner: NDArray[np.int32]) -> Array:
    """All rows that a dispatch delivers, sorted by (owner, expert, source rank, token, slot)."""
    parts = []
    for rank, idx in enumerate(topk_idxs):
        token, slot = np.nonzero((idx >= 0) & (owner[idx] >= 0))
        part = np.zeros(len(token), _ROW)
        part["expert"] = idx[token, slot]
        part["owner"] = owner[part["expert"]]
        part["src_rank"], part["token"], part["slot"] = rank, token, slot
        parts.append(part)
    return np.sort(np.concatenate(parts), order=_ROW.names)


def _through_int8(recv_x: Array, back: bool) -> tuple[Array, NDArray[np.float32] | None]:
    q, scales = quantize(recv_x)
    return (dequantize(q, scales, recv_x.dtype), None) if back else (q, scales)
