"""Worlds made from parts of MPI.COMM_WORLD: several at once, side by side with the world of all."""

from __future__ import annotations

import numpy as np
from cases import check, main, values
from mpi4py import MPI

import xccl


def program() -> None:
    world = MPI.COMM_WORLD
    part = world.Split(world.rank % 2, -world.rank)
    with xccl.init() as everybody, xccl.init(comm=part) as some:
        if (some.rank, some.size) != (part.rank, part.size) or everybody.size != world.size:
            raise AssertionError(f"xccl: {some.rank} of {some.size}, MPI: {part.rank} of {part.size}")
        for turn, count in enumerate((1, 500, 30000)):
            for ours, theirs in ((some, part), (everybody, world)):
                x = values(world.rank, turn, (theirs.size, count), "float32")
                out = np.empty_like(x)
                theirs.Alltoall(x, out)
                check(ours.all_to_all(x), out, "all_to_all", count, theirs.size)
    part.Free()


main(program)
