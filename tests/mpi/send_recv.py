"""send and recv against MPI's Send and Recv: every pair of ranks, tags in and out of order."""

from __future__ import annotations

import numpy as np
from cases import COUNTS, MOVED, check, main, values
from mpi4py import MPI

import xccl


def ring(comm: xccl.Communicator) -> None:
    """Each rank gets from its left neighbour, for every distance."""
    world = MPI.COMM_WORLD
    for turn, (name, count) in enumerate((name, count) for name in MOVED for count in COUNTS):
        distance = turn % comm.size
        to, source = (comm.rank + distance) % comm.size, (comm.rank - distance) % comm.size
        x = values(comm.rank, turn, (count,), name)
        ours, theirs = np.empty_like(x), np.empty_like(x)
        request = world.Isend(x, to, tag=turn)
        world.Recv(theirs, source, tag=turn)
        request.Wait()
        sending = comm.isend(x, to, tag=turn)
        comm.recv(ours, source, tag=turn)
        sending.wait()
        check(ours, theirs, "send", name, count, distance)


def tags_out_of_order(comm: xccl.Communicator) -> None:
    """The receiver asks for the last tag first."""
    world, tags = MPI.COMM_WORLD, [3, 9, 4, 7]
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    messages = [values(comm.rank, tag, (tag * 700,), "float64") for tag in tags]
    for ours in (False, True):
        send = comm.isend if ours else world.Isend
        pending = [send(x, to, tag=tag) for x, tag in zip(messages, tags, strict=True)]
        for tag in reversed(tags):
            out = np.empty(tag * 700)
            (comm.recv if ours else world.Recv)(out, source, tag=tag)
            check(out, values(source, tag, out.shape, "float64"), "tag", tag, "xccl" if ours else "MPI")
        for request in pending:
            request.wait() if ours else request.Wait()


def program() -> None:
    with xccl.init(comm=MPI.COMM_WORLD) as comm:
        ring(comm)
        tags_out_of_order(comm)
        comm.barrier()


main(program)
