"""Random MoE operations, compared with xccl.reference bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

import xccl
from xccl import reference

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def assert_same_numbers(actual: np.ndarray, expected: np.ndarray, what: object = "") -> None:
    """Same bits, but any NaN equals any NaN: which of two operands lends its payload is not defined."""
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(actual.astype(np.float32)), nan, str(what))
    np.testing.assert_array_equal(bits(actual)[~nan], bits(expected)[~nan], str(what))


@dataclass(frozen=True)
class Layer:
    """The shape of an MoE layer on `size` ranks."""

    size: int
    num_experts: int
    hidden: int
    num_topk: int
    max_tokens: int
    dtype: np.dtype
    quant: str | None
    expert_map: list[int] | None

    def open(self, comm: xccl.Communicator) -> xccl.ExpertParallel:
        return xccl.ExpertParallel(
            comm,
            self.num_experts,
            self.hidden,
            self.num_topk,
            self.max_tokens,
            self.dtype,
            self.quant,
            self.expert_map,
        )


def random_layer(rng: np.random.Generator, size: int) -> Layer:
    num_experts = int(rng.choice([rng.integers(1, size + 2), rng.integers(1, 40)]))
    hidden = int(rng.choice([1, rng.integers(1, 100), rng.integers(1, 1025), 8192], p=[0.1, 0.5, 0.35, 0.05]))
    return Layer(
        size=size,
        num_experts=num_experts,
        hidden=hidden,
        num_topk=int(rng.choice([rng.integers(1, 5), rng.integers(1, 17)])),
        max_tokens=int(rng.integers(1, 24)),
        dtype=DTYPES[rng.integers(3)],
        quant="int8" if rng.random() < 0.5 else None,
        expert_map=rng.integers(0, size, num_experts).tolist() if rng.random() < 0.3 else None,
    )


@dataclass
class Batch:
    """One dispatch and combine: inputs and expected results of all ranks."""

    layer: Layer
    xs: list[np.ndarray]
    idxs: list[np.ndarray]
    weights: list[np.ndarray]
    alive: list[bool] | None = None
    received: list[reference.Received] = field(init=False)
    ys: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        layer = self.layer
        self.received = reference.dispatch(
            self.xs, self.idxs, layer.num_experts, expert_map=layer.expert_map, alive=self.alive, quant=layer.quant
        )
        self.ys = [expert_outputs(r, layer) for r in self.received]

    def raw(self) -> list[reference.Received]:
        layer = self.layer
        return reference.dispatch(
            self.xs,
            self.idxs,
            layer.num_experts,
            expert_map=layer.expert_map,
            alive=self.alive,
            quant=layer.quant,
            dequantize=False,
        )

    def outs(self, weighted: bool, on_missing: str = "raise") -> list[np.ndarray]:
        weights = self.weights if weighted else None
        return reference.combine(
            self.ys,
            self.idxs,
            self.layer.num_experts,
            weights,
            expert_map=self.layer.expert_map,
            alive=self.alive,
            on_missing=on_missing,
        )


def expert_outputs(received: reference.Received, layer: Layer) -> np.ndarray:
    """A stand-in for the experts that tells rows and experts apart."""
    local = np.repeat(np.arange(len(received.num_recv_tokens_per_expert)), received.num_recv_tokens_per_expert).astype(
        np.float32
    )
    with np.errstate(all="ignore"):
        return (received.recv_x.astype(np.float32) * (local[:, None] + 0.75)).astype(layer.dtype)


Arrays = list[np.ndarray]


def random_inputs(rng: np.random.Generator, layer: Layer, num_sources: int) -> tuple[Arrays, Arrays, Arrays]:
    """Random tokens, experts and weights: -1 and duplicates, skew, any number of tokens, none on some ranks."""
    tokens = rng.integers(0, layer.max_tokens + 1, num_sources) * (rng.random(num_sources) < 0.8)
    holes, skew = rng.choice([0, 0.3, 1], p=[0.4, 0.5, 0.1]), rng.choice([1, 4])
    xs, idxs, weights = [], [], []
    for n in tokens:
        x = rng.standard_normal((n, layer.hidden)) * 2.0 ** rng.integers(-6, 6)
        if rng.random() < 0.1 and n:
            x[rng.integers(n), rng.integers(layer.hidden)] = rng.choice([np.inf, -np.inf, np.nan, 1e-42])
        xs.append(x.astype(layer.dtype))
        idx = (rng.random((n, layer.num_topk)) ** skew * layer.num_experts).astype(np.int64)
        idxs.append(np.where(rng.random(idx.shape) < holes, -1, idx))
        weights.append(rng.standard_normal(idx.shape).astype(np.float32))
    return xs, idxs, weights


def random_batch(rng: np.random.Generator, layer: Layer, alive: list[bool] | None = None) -> Batch:
    return Batch(layer, *random_inputs(rng, layer, layer.size), alive)


def place(
    kind: str, y: np.ndarray, group: xccl.ExpertParallel | xccl.AttentionExpert, recv_x: np.ndarray, heap: np.ndarray
) -> np.ndarray:
    """y in one of the places where a caller may keep it."""
    if kind == "recv_x":
        target = recv_x
    elif kind == "pool":
        target = group.empty(len(y))
    elif kind == "strided":  # rows of the pool with gaps between them
        target = group.empty(2 * len(y))[::2]
    elif kind == "heap" and y.nbytes <= heap.nbytes - 64:
        target = heap[64 : 64 + y.nbytes].view(y.dtype).reshape(y.shape)
    else:
        return y.copy()
    target[...] = y
    return target


def check_received(batch: Batch, rank: int, recv_x: np.ndarray, handle: object, what: object = "") -> None:
    expected = batch.received[rank]
    check_rows(expected, np.arange(len(batch.xs)), recv_x, handle, what)


def check_rows(
    expected: reference.Received, sources: np.ndarray, recv_x: np.ndarray, handle: object, what: object = ""
) -> None:
    """`sources` are the ranks that `expected` numbers from 0."""
    assert_same_numbers(recv_x, expected.recv_x, what)
    for name, value in (
        ("num_recv_tokens_per_expert", expected.num_recv_tokens_per_expert),
        ("src_rank", sources[expected.src_rank]),
        ("src_token", expected.src_token),
    ):
        actual = getattr(handle, name)
        assert actual.dtype == np.int32
        np.testing.assert_array_equal(actual, value, f"{name}: {what}")
    assert handle.num_recv == len(expected.recv_x)
