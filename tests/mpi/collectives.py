"""Every collective against its MPI counterpart, on the world and on groups of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from cases import COUNTS, MOVED, MPI_OPS, REDUCED, check, main, values
from mpi4py import MPI

import xccl


def moves(ours: xccl.Communicator, theirs: Any, dtypes: list[str] = MOVED) -> None:
    n, me = ours.size, ours.rank
    for turn, (name, count) in enumerate((name, count) for name in dtypes for count in COUNTS):
        x = values(me, turn, (n, count), name)
        out = np.empty_like(x)
        theirs.Alltoall(x, out)
        check(ours.all_to_all(x), out, "all_to_all", name, count)
        theirs.Allgather(np.ascontiguousarray(x[0]), out)
        check(ours.all_gather(x[0]), out, "all_gather", name, count)
        root = turn % n
        buf = x[0].copy()
        theirs.Bcast(buf, root)
        check(ours.broadcast(x[0].copy(), root), buf, "broadcast", name, count, root)
        theirs.Barrier()
        ours.barrier()


def moves_of_different_lengths(ours: xccl.Communicator, theirs: Any, dtypes: list[str] = MOVED) -> None:
    n, me = ours.size, ours.rank
    for turn, (name, most) in enumerate((name, most) for name in dtypes for most in COUNTS):
        counts = np.random.default_rng(turn).integers(0, most + 1, (n, n))
        counts[turn % n] = 0  # one rank sends nothing
        send, receive = counts[me], counts[:, me]
        x = values(me, turn, (int(send.sum()),), name)
        out = np.empty(int(receive.sum()), name)
        theirs.Alltoallv(
            [x, send, np.cumsum(send) - send, MPI._typedict[x.dtype.char]],
            [out, receive, np.cumsum(receive) - receive, MPI._typedict[x.dtype.char]],
        )
        check(ours.all_to_all_v(x, send), out, "all_to_all_v", name, most)
        check(ours.all_to_all_v(x, send, receive), out, "all_to_all_v with recv_counts", name, most)


def reductions(ours: xccl.Communicator, theirs: Any, dtypes: list[str] = REDUCED) -> None:
    n, me = ours.size, ours.rank
    for turn, (name, count) in enumerate((name, count) for name in dtypes for count in COUNTS):
        x = values(me, turn, (n, count), name)
        for word, op in MPI_OPS.items():
            out = np.empty_like(x)
            theirs.Allreduce(x, out, op)
            check(ours.all_reduce(x, word), out, "all_reduce", name, count, word)
            part = np.empty(count, name)
            theirs.Reduce_scatter_block(x, part, op)
            check(ours.reduce_scatter(x, word)[0], part, "reduce_scatter", name, count, word)
            theirs.Reduce_scatter(x, part, [count] * n, op)
            check(ours.reduce_scatter(x, word)[0], part, "reduce_scatter", name, count, word)


def floats_in_any_order(ours: xccl.Communicator, theirs: Any) -> None:
    """MPI may sum in another order, so floats agree up to rounding; ours must be equal on all ranks."""
    for name, tolerance in (("float32", 1e-4), ("float64", 1e-12)):
        x = np.random.default_rng(ours.rank).standard_normal(3001).astype(name)
        out = np.empty_like(x)
        theirs.Allreduce(x, out, MPI.SUM)
        total = ours.all_reduce(x)
        if not np.allclose(total, out, rtol=tolerance, atol=tolerance):
            raise AssertionError(f"all_reduce of {name}: {total - out}")
        if len(set(theirs.allgather(total.tobytes()))) != 1:
            raise AssertionError("ranks have different bits")


def groups(comm: xccl.Communicator) -> None:
    """Groups made by split on both sides: odd and even ranks, then all ranks in reverse order."""
    world = MPI.COMM_WORLD
    for color, key in ((comm.rank % 2, 0), (0, -comm.rank), (comm.rank // 3, -comm.rank)):
        ours, theirs = comm.split(color, key), world.Split(color, key)
        assert ours is not None
        if (ours.rank, ours.size) != (theirs.rank, theirs.size):
            raise AssertionError(f"split: {ours.rank} of {ours.size}, MPI {theirs.rank} of {theirs.size}")
        for compare in (moves, moves_of_different_lengths, reductions):
            compare(ours, theirs, ["float64"])
        ours.close()
        theirs.Free()


def program() -> None:
    with xccl.init(comm=MPI.COMM_WORLD) as comm:
        for compare in (moves, moves_of_different_lengths, reductions, floats_in_any_order):
            compare(comm, MPI.COMM_WORLD)
        groups(comm)


main(program)
