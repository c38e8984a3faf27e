"""A mixture-of-experts layer whose experts are spread over the ranks, checked against the dense computation.

xccl run -n 2 examples/moe_layer.py
"""

import numpy as np
from numpy.typing import NDArray

import xccl

HIDDEN, INNER, NUM_EXPERTS, NUM_TOPK, NUM_TOKENS = 64, 128, 8, 2, 24
Array = NDArray[np.float32]


def make_weights() -> tuple[Array, Array, Array]:
    """Gate [hidden, experts], up [experts, hidden, inner], down [experts, inner, hidden]; equal on all ranks."""
    rng = np.random.default_rng(0)
    shapes = (HIDDEN, NUM_EXPERTS), (NUM_EXPERTS, HIDDEN, INNER), (NUM_EXPERTS, INNER, HIDDEN)
    gate, up, down = (rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-2])) for shape in shapes)
    return gate, up, down


def route(x: Array, gate: Array) -> tuple[NDArray[np.int64], Array]:
    """The best experts of each token, and the softmax of their scores as weights."""
    scores = x @ gate
    topk_idx = np.argsort(-scores, axis=1, kind="stable")[:, :NUM_TOPK].astype(np.int64)
    exps = np.exp(np.take_along_axis(scores, topk_idx, axis=1))
    return topk_idx, exps / exps.sum(axis=1, keepdims=True)


def expert(rows: Array, up: Array, down: Array) -> Array:
    """One expert: two matrix products with a ReLU between them."""
    return np.maximum(rows @ up, 0) @ down


def moe_layer(ep: xccl.ExpertParallel, x: Array, gate: Array, up: Array, down: Array) -> Array:
    """The layer: route, send tokens to their experts, compute, send the outputs back."""
    topk_idx, topk_weights = route(x, gate)
    recv_x, handle = ep.dispatch(x, topk_idx, topk_weights)
    y = ep.empty(len(recv_x))
    start = 0
    for e, count in zip(ep.local_experts, handle.num_recv_tokens_per_expert, strict=True):
        y[start : start + count] = expert(recv_x[start : start + count], up[e], down[e])
        start += count
    return ep.combine(y, handle)


def dense_layer(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """The same on one rank, with every expert computed for every token."""
    topk_idx, topk_weights = route(x, gate)
    outputs = np.stack([expert(x, up[e], down[e]) for e in range(NUM_EXPERTS)])
    chosen = outputs[topk_idx, np.arange(len(x))[:, None]]
    return (chosen * topk_weights[:, :, None]).sum(axis=1)


def main() -> None:
    with xccl.init() as comm:
        gate, up, down = make_weights()
        x = np.random.default_rng(1 + comm.rank).standard_normal((NUM_TOKENS, HIDDEN), np.float32)
        with xccl.ExpertParallel(comm, NUM_EXPERTS, HIDDEN, NUM_TOPK, NUM_TOKENS, dtype="float32") as ep:
            out = moe_layer(ep, x, gate, up, down)
        error = np.abs(out - dense_layer(x, gate, up, down)).max()
        if error > 1e-4:
            raise SystemExit(f"rank {comm.rank}: differs from the dense layer by {error:.1e}")
        if comm.rank == 0:
            print(f"{comm.size} ranks, {NUM_EXPERTS} experts: equal to the dense layer within 1e-4")


if __name__ == "__main__":
    main()
