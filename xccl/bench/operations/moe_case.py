"""What dispatch, combine and moe share: a layer, its tokens, what must arrive."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from xccl import reference
from xccl.bench.moe_twin import Twin
from xccl.bench.operation import Array, Case, as_bytes, count_wrong
from xccl.bench.settings import Settings
from xccl.bench.workload import SHAPES, choose_experts, chosen_rows, moved_rows, received_rows
from xccl.expert_parallel import ExpertParallel
from xccl.moe_config import Quant
from xccl.reference import default_expert_map

MOE_DTYPES = ("int8", "bfloat16", "float32")
_SCALE_BYTES = 4


def row_bytes(dtype: np.dtype[Any], hidden: int) -> tuple[int, int]:
    """Bytes of a row that goes out, and of one that comes back: int8 with a scale comes back as bfloat16."""
    if dtype == np.int8:
        return hidden + _SCALE_BYTES, hidden * 2
    return hidden * dtype.itemsize, hidden * dtype.itemsize


def token_counts(settings: Settings, itemsize: int, ranks: int) -> list[int]:
    """The tokens of a rank asked for."""
    return list(settings.tokens)


class MoeCase(Case):
    """`count` tokens a rank in a layer whose experts give back what they get. Buffers differ in tokens and routing.

    With dtype int8, rows go out as int8 with a scale and come back as bfloat16.
    """

    dispatches = False  # whether the bytes of dispatch belong to the row, and those of combine
    combines = False

    def roles(self) -> tuple[int, int]:
        """How many ranks have tokens, and how many experts; sets `source_index`, `owner_index`: which this one is."""
        self.source_index: int | None = self.comm.rank
        self.owner_index: int | None = self.comm.rank
        return self.comm.size, self.comm.size

    def prepare(self) -> None:
        settings = self.context.settings
        self.shape = SHAPES[settings.shape]
        self.sources, self.owners = self.roles()
        self.quant = self.context.dtype == np.int8
        self.dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16) if self.quant else self.context.dtype
        routings = [
            choose_experts(settings.workload, settings.seed, buffer, self.sources, self.count, self.shape, self.owners)
            for buffer in range(self.buffers)
        ]
        self.nbytes = self._bytes_of_busiest(routings[0])
        self.rows = received_rows(routings[0], self.shape.num_experts, self.owners)
        self.expected_rows: list[Array] = []
        self.tokens = [self._tokens(buffer, slots) for buffer, slots in enumerate(routings)]
        self.last: tuple[int, Array] | None = None
        self.open()

    def open(self) -> None:
        """Makes what carries the rows. Collective."""
        hidden, num_topk, num_experts = self.shape.hidden, self.shape.num_topk, self.shape.num_experts
        quant: Quant = "int8" if self.quant else None
        self.ep = ExpertParallel(self.comm, num_experts, hidden, num_topk, self.count, self.dtype, quant)

    def dispatch(self, buffer: int) -> None:
        """Brings the rows; they are checked if no dispatch follows."""
        x, slots, weights = self.tokens[buffer]
        self.last = None  # its memory is recycled
        recv_x, self.handle = self.ep.dispatch(x, slots, weights)
        self.last = (buffer, recv_x)

    def combine(self, buffer: int) -> None:
        """Sums the rows that came last, as their own outputs."""
        if self.last is not None:
            self.ep.combine(self.last[1], self.handle, out=self.results[buffer][0])

    def _tokens(self, buffer: int, routing: list[Array]) -> tuple[Array, Array, Array]:
        """This rank's x, topk_idx and weights; notes what must arrive."""
        xs = [self._x(peer, buffer, len(idx)) for peer, idx in enumerate(routing)]
        carried = [self._carry(x) for x in xs]
        if self.owner_index is not None:
            self.expected_rows.append(self._expected_rows(carried, routing))
        if self.source_index is None:
            return xs[0][:0], routing[0][:0], np.zeros((0, self.shape.num_topk), np.float32)
        slots = routing[self.source_index]
        rng = np.random.default_rng((self.context.settings.seed, buffer, self.source_index, 1))
        weights: Array = np.asarray(rng.random(slots.shape, np.float32))
        own = carried[self.source_index].astype(np.float32)
        total = np.zeros(own.shape, np.float32)
        for slot in range(slots.shape[1]):
            total += weights[:, slot, None] * own
        self.results.append((np.empty_like(xs[self.source_index]), total.astype(self.dtype)))
        return xs[self.source_index], slots, weights

    def _x(self, rank: int, buffer: int, tokens: int) -> Array:
        rng = np.random.default_rng((self.context.settings.seed, buffer, rank))
        return rng.standard_normal((tokens, self.shape.hidden), np.float32).astype(self.dtype)

    def _carry(self, x: Array) -> Array:
        """x as it arrives."""
        return reference.dequantize(*reference.quantize(x), self.dtype) if self.quant else x

    def _expected_rows(self, carried: list[Array], routing: list[Array]) -> Array:
        """Rows of this rank's experts, sorted by (expert, source rank, token)."""
        owner = default_expert_map(self.shape.num_experts, self.owners)
        experts = np.concatenate(routing)  # its rows are in the order of (source rank, token)
        token, slot = np.nonzero(owner[experts] == self.owner_index)
        order = np.argsort(experts[token, slot], kind="stable")
        return np.asarray(np.concatenate(carried)[token[order]])

    def _bytes_of_busiest(self, routing: list[Array]) -> int:
        """Bytes that must move to the rank that gets most."""
        out_bytes, back_bytes = row_bytes(self.context.dtype, self.shape.hidden)
        out = moved_rows(routing, self.shape.num_experts, self.owners).sum(axis=0) * out_bytes
        back = chosen_rows(routing, self.shape.num_experts, self.owners).sum(axis=1) * back_bytes
        return self._busiest(out * self.dispatches, back * self.combines)

    def _busiest(self, out: Array, back: Array) -> int:
        """The most bytes of any rank, from those that come to ranks with experts and to ranks with tokens."""
        return int((out + back).max())

    def note(self) -> str:
        settings, shape = self.context.settings, self.shape
        return (
            f"{self.count} tokens a rank, {settings.shape}: hidden {shape.hidden}, top-{shape.num_topk} of "
            f"{shape.num_experts}; {settings.workload}, seed {settings.seed}: rows received a rank max "
            f"{self.rows.max()}, mean {self.rows.mean():.1f}, max/mean {self.rows.max() / self.rows.mean():.2f}"
        )

    def poison(self) -> None:
        super().poison()
        if self.last is not None:
            np.invert(as_bytes(self.last[1]), out=as_bytes(self.last[1]))  # before its memory is recycled
            self.last = None

    def wrong(self, runs: int) -> int:
        wrong = super().wrong(runs) if self.combines else 0
        if self.last is None:
            return wrong + sum(expected.size for expected in self.expected_rows[:runs])
        buffer, recv_x = self.last
        return wrong + count_wrong(np.asarray(recv_x), self.expected_rows[buffer])

    def close(self) -> None:
        self.last = None
        self.ep.close()


class MpiMoeCase(MoeCase):
    """The same as people write it with NumPy and MPI."""

    is_twin = True

    def open(self) -> None:
        shape = self.shape
        self.twin = Twin(
            self.context.world,
            self.context.mpi,
            shape.num_experts,
            shape.hidden,
            shape.num_topk,
            self.dtype,
            quantise=self.quant,
        )

    def dispatch(self, buffer: int) -> None:
        recv_x, self.route = self.twin.dispatch(*self.tokens[buffer])
        self.last = (buffer, recv_x)

    def combine(self, buffer: int) -> None:
        if self.last is not None:
            self.twin.combine(self.last[1], self.route, self.results[buffer][0])

    def close(self) -> None:
        self.last = None
