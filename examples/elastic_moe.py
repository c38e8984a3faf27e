"""Decoding goes on when a rank is killed: the others keep the numbers of their experts and do without its experts.

xccl run -n 4 --keep-going examples/elastic_moe.py
"""

import os
import signal

import numpy as np
from numpy.typing import NDArray

import xccl

HIDDEN, INNER, NUM_EXPERTS, NUM_TOPK, NUM_TOKENS = 64, 128, 8, 2, 16
NUM_STEPS, FATAL_STEP = 20, 5
Array = NDArray[np.float32]
Weights = tuple[Array, Array, Array]


def make_weights() -> Weights:
    """Gate [hidden, experts], up [experts, hidden, inner], down [experts, inner, hidden]; equal on all ranks."""
    rng = np.random.default_rng(0)
    shapes = (HIDDEN, NUM_EXPERTS), (NUM_EXPERTS, HIDDEN, INNER), (NUM_EXPERTS, INNER, HIDDEN)
    gate, up, down = (rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-2])) for shape in shapes)
    return gate, up, down


def route(x: Array, gate: Array) -> tuple[NDArray[np.int64], Array]:
    """The best experts of each token, lost ones too, and the softmax of their scores as weights."""
    scores = x @ gate
    topk_idx = np.argsort(-scores, axis=1, kind="stable")[:, :NUM_TOPK].astype(np.int64)
    exps = np.exp(np.take_along_axis(scores, topk_idx, axis=1))
    return topk_idx, exps / exps.sum(axis=1, keepdims=True)


def open_layer(comm: xccl.Communicator, expert_map: NDArray[np.int32] | None = None) -> xccl.ExpertParallel:
    """The layer on these ranks. The weights of a token's live experts are scaled up where others are missing."""
    return xccl.ExpertParallel(
        comm, NUM_EXPERTS, HIDDEN, NUM_TOPK, NUM_TOKENS, "float32", expert_map=expert_map, on_missing="renormalize"
    )


def moe_layer(ep: xccl.ExpertParallel, x: Array, weights: Weights, *, die: bool) -> Array:
    """Route, send tokens to their experts, compute, send the outputs back."""
    gate, up, down = weights
    recv_x, handle = ep.dispatch(x, *route(x, gate))
    if die:
        os.kill(os.getpid(), signal.SIGKILL)  # stands for a crash, or the kernel's out-of-memory killer
    y, start = ep.empty(len(recv_x)), 0
    for e, count in zip(ep.local_experts, handle.num_recv_tokens_per_expert, strict=True):
        rows = recv_x[start : start + count]
        y[start : start + count] = np.maximum(rows @ up[e], 0) @ down[e]
        start += count
    return ep.combine(y, handle)


def dense_layer(x: Array, weights: Weights, live: NDArray[np.bool_]) -> Array:
    """The same on one rank, with every live expert computed for every token."""
    gate, up, down = weights
    topk_idx, topk_weights = route(x, gate)
    kept = np.where(live[topk_idx], topk_weights, 0)
    kept /= np.maximum(kept.sum(axis=1, keepdims=True), np.float32(1e-30))  # a token without any live expert: zeros
    outputs = np.stack([np.maximum(x @ up[e], 0) @ down[e] for e in range(NUM_EXPERTS)])
    return np.asarray((outputs[topk_idx, np.arange(len(x))[:, None]] * kept[:, :, None]).sum(axis=1))


def decode(comm: xccl.Communicator, weights: Weights) -> tuple[xccl.ExpertParallel, float]:
    """All steps, on fewer ranks if need be; the layer as it is at the end, and the largest error of a step."""
    ep, victim = open_layer(comm), comm.rank > 0 and comm.rank == comm.size - 1
    # The two last states: when a rank is lost, some of the others may have completed the step and some not.
    states = {0: np.random.default_rng(comm.rank).standard_normal((NUM_TOKENS, HIDDEN), np.float32)}
    step, error, lost = 0, 0.0, False
    while True:
        try:
            if lost:
                comm = comm.shrink()  # all survivors have the same view of who is left
                ep = open_layer(comm, ep.expert_map_on(comm))
                step = int(comm.all_reduce(np.array([step]), "min")[0])
                lost = False
            if step == NUM_STEPS:
                comm.barrier()  # nobody leaves while another may have to repeat the last step
                return ep, error
            x = states[step]
            out = moe_layer(ep, x, weights, die=victim and step == FATAL_STEP)
            error = max(error, float(np.abs(out - dense_layer(x, weights, ep.live_experts)).max()))
            following = x + out
            states = {step: x, step + 1: following / np.abs(following).max(axis=1, keepdims=True)}
            step += 1
        except xccl.XcclPeerLost:
            lost = True  # also if the next one dies while this loss is dealt with


def main() -> None:
    with xccl.init() as comm:
        ranks = comm.size
        ep, error = decode(comm, make_weights())
        if error > 1e-4:
            raise SystemExit(f"rank {comm.rank}: differs from the dense layer by {error:.1e}")
        if ep.comm.rank == 0:
            print(
                f"{NUM_STEPS} steps, {ranks} ranks at the start and {ep.comm.size} at the end, with "
                f"{ep.live_experts.sum()} of {NUM_EXPERTS} experts: equal to the dense layer within 1e-4"
            )


if __name__ == "__main__":
    main()
