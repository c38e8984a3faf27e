"""What a2e, e2a and ma_layer share: a layer whose attention and experts are on separate ranks."""

from __future__ import annotations

from typing import Any

from xccl.attention_expert import AttentionExpert
from xccl.bench.ma_twin import MaTwin
from xccl.bench.operation import Array
from xccl.bench.operations.moe_case import MoeCase
from xccl.moe_config import Quant

_PAPER = 160 / (160 + 288)  # the dies of the paper's deployment that attend


def attention_ranks(ranks: int) -> int:
    """How many of so many ranks attend: the paper's share, at least one, and one is left for the experts."""
    return min(max(round(ranks * _PAPER), 1), ranks - 1)


class AttentionCase(MoeCase):
    """`count` tokens an attention rank; the first ranks attend, the experts of the others give back what they get."""

    def roles(self) -> tuple[int, int]:
        rank, ranks = self.comm.rank, self.comm.size
        attention = attention_ranks(ranks)
        self.source_index = rank if rank < attention else None
        self.owner_index = rank - attention if rank >= attention else None
        return attention, ranks - attention

    def open(self) -> None:
        quant: Quant = "int8" if self.quant else None
        ranks, attention = range(self.comm.size), self.sources
        self.ae = AttentionExpert(
            self.comm, ranks[:attention], ranks[attention:], self.shape.num_experts, self.shape.hidden,
            self.shape.num_topk, self.count, self.dtype, quant,
        )  # fmt: skip
        self.pending: Any = None  # a micro-batch that has gone out and not come back

    def go_out(self, buffer: int) -> None:
        """A2E; the rows are checked if no other follows."""
        x, slots, weights = self.tokens[buffer]
        self.last = None  # its memory is recycled
        if self.source_index is not None:
            self.send(x, slots, weights)
            self.pending = buffer
        else:
            recv_x = self.receive_rows()
            self.last, self.pending = (buffer, recv_x), recv_x

    def come_back(self) -> None:
        """E2A of what went out last, if anything."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        if self.source_index is not None:
            self.take(self.tokens[pending][2], self.results[pending][0])
        else:
            self.send_back(pending)

    def send(self, x: Array, slots: Array, weights: Array) -> None:
        """A2E at an attention rank."""
        self.ae.a2e(x, slots, weights)

    def receive_rows(self) -> Array:
        """A2E at an expert rank."""
        recv_x, self.handle_a2e = self.ae.a2e_recv()
        return recv_x

    def send_back(self, y: Array) -> None:
        """E2A at an expert rank."""
        self.ae.e2a_send(y, self.handle_a2e)

    def take(self, weights: Array, out: Array) -> None:
        """E2A at an attention rank."""
        self.ae.e2a(out=out)

    def _busiest(self, out: Array, back: Array) -> int:
        return int(out.max() + back.max())

    def note(self) -> str:
        return f"{self.sources} attention ranks, {self.owners} expert ranks; {super().note()}"

    def close(self) -> None:
        self.come_back()
        self.last = None
        self.ae.close()


class MpiAttentionCase(AttentionCase):
    """The same as people write it with NumPy and MPI."""

    is_twin = True

    def open(self) -> None:
        shape = self.shape
        self.twin = MaTwin(
            self.context.world, self.context.mpi, self.sources, shape.num_experts, shape.hidden, shape.num_topk,
            self.dtype, quantise=self.quant,
        )  # fmt: skip
        self.pending = None

    def send(self, x: Array, slots: Array, weights: Array) -> None:
        self.twin.a2e(x, slots)

    def receive_rows(self) -> Array:
        return self.twin.a2e_recv()

    def send_back(self, y: Array) -> None:
        self.twin.e2a_send(y)

    def take(self, weights: Array, out: Array) -> None:
        self.twin.e2a(weights, out)

    def close(self) -> None:
        self.come_back()
        self.last = None
        self.twin.close()
