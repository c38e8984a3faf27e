"""The bytes of dispatch and combine, packed already, moved by MPI: a twin whose NumPy costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from xccl.bench.operation import Array, Case, pattern
from xccl.bench.operations.moe_case import row_bytes
from xccl.bench.workload import SHAPES, choose_experts, chosen_rows, moved_rows

_BYTE = np.dtype(np.uint8)
_BACK = 64  # sets of arrays beyond those of a row: what comes back has another content


class PackedCase(Case):
    """One Alltoallv of the rows out, one of the rows back. Nothing is quantised, sorted, gathered or summed."""

    is_twin = True
    dispatches = False
    combines = False

    def prepare(self) -> None:
        settings, ranks = self.context.settings, self.comm.size
        shape = SHAPES[settings.shape]
        out_bytes, back_bytes = row_bytes(self.context.dtype, shape.hidden)
        self.calls_of: list[list[Callable[[], object]]] = []
        for buffer in range(self.buffers):
            routing = choose_experts(settings.workload, settings.seed, buffer, ranks, self.count, shape)
            out = moved_rows(routing, shape.num_experts) * out_bytes
            back = chosen_rows(routing, shape.num_experts).T * back_bytes
            calls = []
            if self.dispatches:
                calls.append(self._exchange(out, buffer))
            if self.combines:
                calls.append(self._exchange(back, buffer + _BACK))
            self.calls_of.append(calls)

    def _exchange(self, counts: NDArray[np.int64], buffer: int) -> Callable[[], object]:
        """An Alltoallv of counts[source, destination] bytes."""
        rank, starts = self.comm.rank, np.cumsum(counts, axis=1) - counts
        send = self.source(pattern(rank, buffer, int(counts[rank].sum()), _BYTE))
        parts = [
            pattern(peer, buffer, int(counts[peer, rank]), _BYTE, int(starts[peer, rank]))
            for peer in range(self.comm.size)
        ]
        recv = self.receive(np.concatenate(parts))
        messages = self._message(send, counts[rank]), self._message(recv, counts[:, rank])
        return partial(self.context.world.Alltoallv, *messages)

    def _message(self, a: Array, counts: NDArray[np.int64]) -> list[object]:
        counts = np.ascontiguousarray(counts)
        return [a, counts, np.cumsum(counts) - counts, self.context.mpi.BYTE]

    def source(self, content: Array, *, symmetric: bool = False) -> Array:
        """Bytes, whatever the dtype of the row."""
        return content.copy()

    def receive(self, expected: Array, *, symmetric: bool = False) -> Array:
        """Bytes, whatever the dtype of the row."""
        out = np.zeros_like(expected)
        self.results.append((out, expected))
        return out

    def run(self, i: int) -> None:
        for call in self.calls_of[i % self.buffers]:
            call()

    def wrong(self, runs: int) -> int:
        """A run fills one array for each of its calls."""
        return super().wrong(runs * len(self.calls_of[0]))


class PackedDispatch(PackedCase):
    """The rows out."""

    dispatches = True


class PackedCombine(PackedCase):
    """The rows back."""

    combines = True


class PackedMoe(PackedCase):
    """Both."""

    dispatches = True
    combines = True
