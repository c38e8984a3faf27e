"""Expert-parallel dispatch and combine as one writes them today with NumPy and MPI: the yardstick for xccl's.

As fast as we could make it. No loop over tokens or experts, only over blocks of rows that stay in the second-level
cache; every array is made once and used again. A token goes to a rank once and is quantised and dequantised once;
bfloat16 is converted by bit operations on whole blocks, which is faster than ml_dtypes' casts. One Alltoall of counts,
one Alltoallv of rows each way, and one of the tokens' experts and scales, a few bytes each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from xccl.reference import default_expert_map

Array = np.ndarray[Any, Any]

_BLOCK_ROWS = 32  # a block's temporaries, float32 and wider than a row of bfloat16, stay near the core


def _blocks(count: int) -> Iterator[slice]:
    return (slice(begin, min(begin + _BLOCK_ROWS, count)) for begin in range(0, count, _BLOCK_ROWS))


@dataclass
class Route:
    """What combine needs to know of a dispatch."""

    arrival: Array  # for each row that goes back, by source, token and slot: its place in recv_x
    back_counts: Array  # rows that go back to each source
    home_counts: Array  # rows that come home from each destination
    home: Array  # [num_tokens, num_topk]: its row among those that come home
    weights: Array


class Twin:
    """The contract of xccl.ExpertParallel with its default expert map, over an mpi4py communicator.

    dtype is bfloat16 or float32; with `quantise` rows go out as int8 with a scale. Finite numbers, no -1, and no row
    of zeros. What dispatch returns is valid until the next dispatch.
    """

    def __init__(
        self, comm: Any, mpi: Any, num_experts: int, hidden: int, num_topk: int, dtype: Any, *, quantise: bool = True
    ) -> None:
        self.comm, self.mpi = comm, mpi
        self.size, self.rank = comm.Get_size(), comm.Get_rank()
        self.owner = default_expert_map(num_experts, self.size)
        self.first_expert, self.end_expert = np.searchsorted(self.owner, [self.rank, self.rank + 1])
        self.hidden, self.num_topk, self.dtype, self.quantise = hidden, num_topk, np.dtype(dtype), quantise
        # NumPy moves uint16 faster than bfloat16
        self.bits = np.dtype(np.float32) if self.dtype == np.float32 else np.dtype(np.uint16)
        fields: list[Any] = [("experts", np.int16, num_topk)]
        self.about = np.dtype([*fields, ("scale", np.float32)] if quantise else fields)
        self._kept: dict[str, Array] = {}

    def _array(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """The array of that name, made anew only if it is too small."""
        kind, count = np.dtype(dtype), int(np.prod(shape))
        kept = self._kept.get(name)
        if kept is None or len(kept) < count:
            kept = self._kept[name] = np.empty(count, kind)
        return kept[:count].reshape(shape)

    # ---- blocks of rows ----

    def _widen(self, rows: Array, out: Array) -> None:
        """Exact: a bfloat16 is the upper half of a float32."""
        if self.dtype == np.float32:
            out[...] = rows
        else:
            bits = out.view(np.uint32)
            bits[...] = rows
            np.left_shift(bits, 16, out=bits)

    def _round(self, values: Array, out: Array) -> None:
        """Rounds to nearest even; `values` is spoilt."""
        if self.dtype == np.float32:
            out[...] = values
            return
        bits = values.view(np.uint32)
        odd = self._array("odd", bits.shape, np.uint32)
        np.right_shift(bits, 16, out=odd)
        np.bitwise_and(odd, 1, out=odd)
        odd += 0x7FFF
        bits += odd
        np.right_shift(bits, 16, out=bits)
        np.copyto(out, bits, casting="unsafe")

    def _quantised(self, x: Array, scale: Array) -> Array:
        """int8 rows of x; fills their scales."""
        q = self._array("q", x.shape, np.int8)
        for part in _blocks(len(x)):
            values = self._array("values", x[part].shape, np.float32)
            self._widen(x[part], values)
            magnitude = self._array("magnitude", x[part].shape, np.float32)
            largest = np.abs(values, out=magnitude).max(axis=1)
            scale[part] = largest / np.float32(127)
            values *= (np.float32(1) / scale[part])[:, None]
            np.rint(values, out=values)
            np.copyto(q[part], values, casting="unsafe")
        return q

    def _dequantised(self, q: Array, scale: Array) -> Array:
        rows = self._array("dequantised", q.shape, self.bits)
        for part in _blocks(len(q)):
            values = self._array("values", q[part].shape, np.float32)
            np.multiply(q[part], scale[part, None], out=values)
            self._round(values, rows[part])
        return rows

    def _gathered(self, name: str, rows: Array, index: Array) -> Array:
        out = self._array(name, (len(index), *rows.shape[1:]), rows.dtype)
        return np.take(rows, index, axis=0, out=out, mode="clip")  # with the default mode NumPy copies once more

    # ---- exchange ----

    def _exchange(self, name: str, rows: Array, send_counts: Array, recv_counts: Array) -> Array:
        out = self._array(name, (int(recv_counts.sum()), *rows.shape[1:]), rows.dtype)
        width = rows.itemsize * int(np.prod(rows.shape[1:]))
        sides = []
        for a, counts in ((rows, send_counts * width), (out, recv_counts * width)):
            sides.append([a.reshape(-1).view(np.uint8), counts, np.cumsum(counts) - counts, self.mpi.BYTE])
        self.comm.Alltoallv(*sides)
        return out

    def _send(self, x: Array, topk_idx: Array, token: Array, counts: tuple[Array, Array]) -> tuple[Array, Array]:
        """Sends the tokens of the list `token`; the rows that arrive, in dtype, and what is told about them."""
        about = self._array("about", (len(x),), self.about)
        about["experts"] = topk_idx
        carried = x.view(self.bits)
        if self.quantise:
            carried = self._quantised(carried, about["scale"])
        rows = self._exchange("arrived", self._gathered("packed", carried, token), *counts)
        about = self._exchange("arrived about", self._gathered("packed about", about, token), *counts)
        return (self._dequantised(rows, about["scale"]) if self.quantise else rows), about["experts"]

    # ---- the operations ----

    def dispatch(self, x: Array, topk_idx: Array, topk_weights: Array) -> tuple[Array, Route]:
        """Returns rows sorted by (local expert, source rank, token) and the route for combine."""
        owner = self.owner[topk_idx]
        rows, experts, recv_counts = self._send_tokens(x, topk_idx, owner)
        recv_x, arrival, back_counts = self._sorted(rows, experts, recv_counts)
        home_counts, home = self._homes(owner)
        return recv_x, Route(arrival, back_counts, home_counts, home, topk_weights)

    def _send_tokens(self, x: Array, topk_idx: Array, owner: Array) -> tuple[Array, Array, Array]:
        """The rows that arrive, the experts that each names, and how many come from each source."""
        wanted = np.zeros((self.size, len(x)), bool)
        wanted[owner, np.arange(len(x))[:, None]] = True
        destination, token = np.nonzero(wanted)
        send_counts = np.bincount(destination, minlength=self.size)
        recv_counts = np.empty_like(send_counts)
        self.comm.Alltoall(send_counts, recv_counts)
        return *self._send(x, topk_idx, token, (send_counts, recv_counts)), recv_counts

    def _sorted(self, rows: Array, experts: Array, recv_counts: Array) -> tuple[Array, Array, Array]:
        """recv_x; for each row that goes back its place in it; how many go back to each source."""
        row, slot = np.nonzero((experts >= self.first_expert) & (experts < self.end_expert))
        order = np.argsort(experts[row, slot], kind="stable")
        recv_x = self._gathered("recv_x", rows, row[order]).view(self.dtype)
        # Rows go back in the order of arrival, one for each (row, slot): by source, token, slot.
        arrival = np.empty(len(order), np.int64)
        arrival[order] = np.arange(len(order))
        source = np.repeat(np.arange(self.size), recv_counts)[row]
        return recv_x, arrival, np.bincount(source, minlength=self.size)

    def _homes(self, owner: Array) -> tuple[Array, Array]:
        """Rows that come home from each destination, and which of them belongs to each token and slot."""
        home_counts = np.bincount(owner.ravel(), minlength=self.size)
        slots = np.argsort(owner.ravel(), kind="stable")
        home = np.empty(len(slots), np.int64)
        home[slots] = np.arange(len(slots))
        return home_counts, home.reshape(owner.shape)

    def combine(self, y: Array, route: Route, out: Array) -> None:
        """Weighted sum in float32 of each token's expert outputs, to `out` [num_tokens, hidden]."""
        back = self._gathered("back", y.view(self.bits), route.arrival)
        self._sum(self._exchange("home", back, route.back_counts, route.home_counts), route.home, route.weights, out)

    def _sum(self, rows: Array, home: Array, weights: Array, out: Array) -> None:
        result = out.view(self.bits)
        for part in _blocks(len(result)):
            shape = result[part].shape
            total, values = self._array("total", shape, np.float32), self._array("values", shape, np.float32)
            total[...] = 0
            for slot in range(self.num_topk):
                self._widen(self._gathered("terms", rows, home[part, slot]), values)
                values *= weights[part, slot, None]
                total += values
            self._round(total, result[part])
