"""Matrix products whose rows do not depend on the other rows of the batch.

Batched serving gives the same bits as one request alone only if row i of ``x @ w`` is a function of ``x[i]`` and
``w``. BLAS does not promise that: a single row takes the matrix-vector path, and some kernels (OpenBLAS on AVX2)
sum in another order at the edge of a block. So the products go through :class:`RowGemm`, and :func:`probe` finds
out at start which form this BLAS on this CPU allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xccl.serving.arrays import FloatArray, IntArray

_PROBE_ROWS = (2, 3, 4, 5, 7, 8, 12, 13, 16, 24, 31, 33, 64, 100, 128)
_TILES = (8, 4, 16)


@dataclass(frozen=True)
class RowGemm:
    """``x @ w`` in one call (``tile`` None) or in tiles of a fixed number of rows.

    ``row_stable`` says whether :func:`probe` saw the same bits for a row in every batch it tried.
    """

    tile: int | None = None
    row_stable: bool = True

    @property
    def min_rows(self) -> int:
        """Smallest number of rows given to BLAS; one row would take the matrix-vector path."""
        return self.tile or 2

    def linear(self, x: FloatArray, w: FloatArray) -> FloatArray:
        """``x @ w`` for x [rows, in] and w [in, out]; any number of rows, zero too."""
        rows = x.shape[0]
        step = self.min_rows
        if self.tile is None:
            if rows >= step:
                return x @ w
            padded_rows = step if rows else 0
        else:
            padded_rows = -(-rows // step) * step
        if padded_rows != rows:
            padded = np.zeros((padded_rows, x.shape[1]), np.float32)
            padded[:rows] = x
            x = padded
        if self.tile is None:
            return (x @ w)[:rows]
        tiles: FloatArray = np.matmul(x.reshape(-1, self.tile, x.shape[1]), w)
        return tiles.reshape(padded_rows, w.shape[1])[:rows]

    def grouped(self, x: FloatArray, counts: Sequence[int], weights: FloatArray, out: FloatArray) -> None:
        """Multiply consecutive groups of rows by one matrix each: the grouped GEMM of a MoE layer.

        x [rows + slack, in] and out [rows + slack, width] hold ``sum(counts)`` rows and at least ``min_rows - 1``
        rows of slack; weights [groups, in, width]. A short group is computed together with rows that follow it;
        what lands there is overwritten by the groups after it or lies in the slack, whose content is undefined.
        """
        start = 0
        tile = self.tile
        for group, count in enumerate(counts):
            if count == 0:
                continue
            if tile is None:
                stop = start + max(count, 2)
                np.matmul(x[start:stop], weights[group], out=out[start:stop])
            else:
                stop = start + -(-count // tile) * tile
                np.matmul(
                    x[start:stop].reshape(-1, tile, x.shape[1]),
                    weights[group],
                    out=out[start:stop].reshape(-1, tile, out.shape[1]),
                )
            start += count


def probe(shapes: Sequence[tuple[int, int]], seed: int = 0) -> RowGemm:
    """Choose the form of product whose rows are independent of the batch, for weights of the given shapes.

    Tries one call for all rows first, then tiles. Takes a few milliseconds a shape. If no form is stable, the
    result has ``row_stable`` False and equality between batch sizes cannot be demanded.
    """
    rng = np.random.default_rng(seed)
    cases = [
        (rng.standard_normal((2 * max(_PROBE_ROWS), k), np.float32), rng.standard_normal((k, n), np.float32))
        for k, n in sorted(set(shapes))
    ]
    for tile in (None, *_TILES):
        gemm = RowGemm(tile)
        if all(_is_row_stable(gemm, x, w, rng) for x, w in cases):
            return gemm
    return RowGemm(None, row_stable=False)


def _is_row_stable(gemm: RowGemm, x: FloatArray, w: FloatArray, rng: np.random.Generator) -> bool:
    expected = gemm.linear(x, w)
    for rows in _PROBE_ROWS:
        picked: IntArray = rng.permutation(x.shape[0])[:rows]
        if not np.array_equal(gemm.linear(x[picked], w), expected[picked]):
            return False
    return True
