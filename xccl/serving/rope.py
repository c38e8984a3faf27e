"""Rotary position embedding on vectors whose even elements were moved before the odd ones."""

from __future__ import annotations

import numpy as np

from xccl.serving.arrays import FloatArray, IntArray


def even_odd_order(dim: int) -> IntArray:
    """Column order that turns pairs (x[2j], x[2j+1]) into two halves; products of two such vectors stay equal."""
    return np.concatenate([np.arange(0, dim, 2), np.arange(1, dim, 2)])


class RotaryTable:
    """Cosines and sines of every position, computed once in float64."""

    def __init__(self, dim: int, theta: float, max_context: int) -> None:
        frequency = theta ** (-np.arange(0, dim, 2) / dim)
        angle = np.outer(np.arange(max_context), frequency)
        self._cos = np.cos(angle).astype(np.float32)
        self._sin = np.sin(angle).astype(np.float32)

    def at(self, positions: IntArray) -> tuple[FloatArray, FloatArray]:
        """Cosines and sines [rows, 1, dim / 2] for positions [rows]."""
        return self._cos[positions][:, None, :], self._sin[positions][:, None, :]


def rotate(x: FloatArray, cos: FloatArray, sin: FloatArray) -> None:
    """Rotate x [rows, heads, dim] in place; multiplications and additions are separate, so no fused rounding."""
    half = x.shape[-1] // 2
    even, odd = x[..., :half], x[..., half:]
    rotated_even = even * cos
    rotated_even -= odd * sin
    rotated_odd = even * sin
    rotated_odd += odd * cos
    x[..., :half] = rotated_even
    x[..., half:] = rotated_odd
