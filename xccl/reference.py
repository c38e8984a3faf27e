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
    quant: str | None = None,
    dequantize: bool = True,
) -> list[Received]:
    """Sends each token to the ranks of its experts; one Received for each rank.

    xs[rank]: [num_tokens, hidden]; topk_idxs[rank]: [num_tokens, num_topk], -1 for no expert. A token that
    names an expert twice arrives there twice. With ``quant="int8"`` rows pass through `quantize`.
    """
    return a2e(xs, topk_idxs, num_experts, len(xs), expert_map=expert_map, quant=quant, dequantize=dequantize)


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
    rows = _rows([np.asarray(idx) for idx in topk_idxs], owner)
    received = []
    for rank in range(num_expert_ranks):
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
) -> list[Array]:
    """Sums the expert outputs of each token; [num_tokens, hidden] for each rank, in the dtype of ys.

    ys[rank]: [num_recv, hidden], in the order in which `dispatch` delivered the rows to this rank. The sum is
    weighted by topk_weights[rank] ([num_tokens, num_topk]) if given; it runs in float32 over the slots in
    ascending order, multiplication and addition rounded apart, and is rounded once at the end. A token
    without experts gives zeros.
    """
    idxs = [np.asarray(idx) for idx in topk_idxs]
    rows = _rows(idxs, _owner(num_experts, len(ys), expert_map))
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


_ROW = np.dtype([(name, np.int64) for name in ("owner", "expert", "src_rank", "token", "slot")])


def _owner(num_experts: int, num_ranks: int, expert_map: ArrayLike | None) -> NDArray[np.int32]:
    if expert_map is None:
        return default_expert_map(num_experts, num_ranks)
    return np.asarray(expert_map, np.int32)


def _rows(topk_idxs: Sequence[Array], owner: NDArray[np.int32]) -> Array:
    """All rows that a dispatch delivers, sorted by (owner, expert, source rank, token, slot)."""
    parts = []
    for rank, idx in enumerate(topk_idxs):
        token, slot = np.nonzero(idx >= 0)
        part = np.zeros(len(token), _ROW)
        part["expert"] = idx[token, slot]
        part["owner"] = owner[part["expert"]]
        part["src_rank"], part["token"], part["slot"] = rank, token, slot
        parts.append(part)
    return np.sort(np.concatenate(parts), order=_ROW.names)


def _through_int8(recv_x: Array, back: bool) -> tuple[Array, NDArray[np.float32] | None]:
    q, scales = quantize(recv_x)
    return (dequantize(q, scales, recv_x.dtype), None) if back else (q, scales)
