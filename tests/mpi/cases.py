"""What the programs of this folder share: they run under mpirun and compare xccl with mpi4py in the same processes."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

Array = np.ndarray[Any, Any]

MOVED = ["float32", "float64", "int8", "uint8", "int16", "int32", "int64", "uint64", "complex64", "complex128", "bool"]
REDUCED = ["float32", "float64", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
COUNTS = [0, 1, 5, 6, 100, 1000, 20000]
MPI_OPS = {"sum": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX, "prod": MPI.PROD}


def values(rank: int, turn: int, shape: tuple[int, ...], name: str) -> Array:
    """Small whole numbers: sums and short products are exact in every dtype, in any order."""
    rng = np.random.default_rng([rank, turn])
    low = 0 if np.dtype(name).kind in "ub" else -2
    return rng.integers(low, 2, shape, endpoint=True).astype(name)


def check(ours: Array, theirs: Array, *what: object) -> None:
    """Stops the job unless both arrays are equal."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype or not np.array_equal(ours, theirs):
        raise AssertionError(f"{what}: xccl has {ours.dtype}{ours.shape} {ours!r}, MPI has {theirs!r}")


def main(program: Callable[[], None]) -> None:
    """Runs a program; an exception on one rank ends all."""
    try:
        program()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)
    MPI.COMM_WORLD.Barrier()
    if MPI.COMM_WORLD.rank == 0:
        sys.stdout.write("all equal\n")
