"""Inputs and oracles for the tests of collectives: every rank can compute what every other rank has."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

import xccl

Array = np.ndarray[Any, Any]

FLOATS = ["float32", "float64", "float16", "bfloat16"]
INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
DTYPES = [*FLOATS, *INTEGERS, "bool", "complex64", "complex128"]

SENTINEL_BYTES = 64
_SENTINEL = 0xA5


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def values(rank: int, turn: int, shape: tuple[int, ...], name: str) -> Array:
    """What `rank` holds in case `turn`. Floats differ in magnitude, so that the order of a sum shows in its bits."""
    rng = np.random.default_rng([rank, turn])
    dtype = dtype_of(name)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    magnitude = 10.0 ** rng.integers(-2, 3, shape)
    return (rng.standard_normal(shape) * magnitude).astype(dtype)


def reduced(arrays: list[Array], op: str) -> Array:
    """The reduction over the arrays from left to right, 16-bit floats in float32 and rounded once."""
    functions = {"sum": np.add, "min": np.minimum, "max": np.maximum, "prod": np.multiply}
    dtype = arrays[0].dtype
    half = dtype.itemsize == 2 and dtype.kind not in "iu"
    total = arrays[0].astype(np.float32 if half else dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        for array in arrays[1:]:
            total = functions[op](total, array.astype(total.dtype))
        return total.astype(dtype)


def same_bits(a: Array, b: Array) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


class Buffers:
    """Arrays with sentinels in front and behind, in ordinary or in symmetric memory."""

    def __init__(self, comm: xccl.Communicator, nbytes: int, symmetric: bool) -> None:
        self._total = nbytes + 2 * SENTINEL_BYTES
        self._memory = comm.zeros(self._total, np.uint8) if symmetric else np.zeros(self._total, np.uint8)
        self._free = (lambda: comm.free(self._memory)) if symmetric else lambda: None
        self._used = 0

    def array(self, shape: tuple[int, ...], name: str) -> Array:
        dtype = dtype_of(name)
        self._used = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self._memory[: self._used + 2 * SENTINEL_BYTES] = _SENTINEL
        return self._memory[SENTINEL_BYTES : SENTINEL_BYTES + self._used].view(dtype).reshape(shape)

    def filled(self, content: Array) -> Array:
        array = self.array(content.shape, content.dtype.name)
        array[...] = content
        return array

    def check_sentinels(self) -> None:
        behind = SENTINEL_BYTES + self._used
        assert (self._memory[:SENTINEL_BYTES] == _SENTINEL).all(), "written before the buffer"
        assert (self._memory[behind : behind + SENTINEL_BYTES] == _SENTINEL).all(), "written behind the buffer"

    def free(self) -> None:
        self._free()
