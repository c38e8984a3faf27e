"""Times xccl against mpi4py in the same processes, call by call in turn, and prints the table of the README.

    mpirun -n 2 python benchmarks/against_mpi.py [--blocks 15]

Times are medians over blocks of the slowest rank's mean time of a call; the blocks of the two libraries alternate.
Results of both are compared in every row.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from mpi4py import MPI
from twin import Twin

import xccl

BLOCK_SECONDS = 0.05  # a block is long against the clock and short against the noise of a shared machine


@dataclass
class Row:
    """One line of the table: times in microseconds."""

    name: str
    ours: float
    theirs: float

    def text(self) -> str:
        """The row as Markdown."""
        return f"| {self.name} | {self.ours:.1f} | {self.theirs:.1f} | {self.ours / self.theirs:.2f} |"


def slowest_mean(call: Callable[[], object], repeats: int) -> float:
    """Mean time of a call in microseconds, of the rank that took longest."""
    MPI.COMM_WORLD.Barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    mean = (time.perf_counter() - start) / repeats * 1e6
    return float(MPI.COMM_WORLD.allreduce(mean, op=MPI.MAX))


def compare(name: str, ours: Callable[[], object], theirs: Callable[[], object], blocks: int) -> Row:
    """Alternates blocks of both and takes medians."""
    repeats = [max(3, int(BLOCK_SECONDS * 1e6 / slowest_mean(call, 5))) for call in (ours, theirs)]
    times: tuple[list[float], list[float]] = ([], [])
    for block in range(blocks):
        for side in (0, 1) if block % 2 else (1, 0):
            times[side].append(slowest_mean((ours, theirs)[side], repeats[side]))
    return Row(name, statistics.median(times[0]), statistics.median(times[1]))


def all_to_all(comm: xccl.Communicator, nbytes: int, symmetric: bool, blocks: int) -> Row:
    """`nbytes` bytes to each peer."""
    count = max(nbytes // 4, 1) * comm.size
    rng = np.random.default_rng(comm.rank)
    x = rng.integers(0, 1 << 30, count, np.int32)
    theirs = np.empty_like(x)
    source = comm.array(x) if symmetric else x
    ours = comm.empty(x.shape, x.dtype) if symmetric else np.empty_like(x)
    kind = "symmetric" if symmetric else "ordinary"
    row = compare(
        f"all_to_all {nbytes} B a peer, {kind}",
        lambda: comm.all_to_all(source, out=ours),
        lambda: MPI.COMM_WORLD.Alltoall(x, theirs),
        blocks,
    )
    require_equal(row.name, ours, theirs)
    if symmetric:
        comm.free(source)
        comm.free(ours)
    return row


def moe(comm: xccl.Communicator, tokens: int, blocks: int) -> Row:
    """dispatch (int8) and combine (bfloat16): hidden 7168, 256 experts, top-8, uniform routing."""
    hidden, num_experts, num_topk = 7168, 256, 8
    rng = np.random.default_rng(comm.rank)
    x = rng.standard_normal((tokens, hidden), np.float32).astype(ml_dtypes.bfloat16)
    idx = rng.permuted(np.tile(np.arange(num_experts), (tokens, 1)), axis=1)[:, :num_topk].copy()
    weights = rng.random((tokens, num_topk), np.float32)
    out = np.empty_like(x)
    with xccl.ExpertParallel(comm, num_experts, hidden, num_topk, tokens, quant="int8") as ep:
        twin = Twin(MPI.COMM_WORLD, MPI, num_experts, hidden, num_topk, ml_dtypes.bfloat16)
        last: dict[str, Any] = {}

        def ours() -> None:
            recv_x, handle = ep.dispatch(x, idx, weights)
            last["ours"] = recv_x
            ep.combine(recv_x, handle, out=out)

        def theirs() -> None:
            last["theirs"], route = twin.dispatch(x, idx, weights)
            last["out"] = twin.combine(last["theirs"], route)

        row = compare(f"dispatch + combine, {tokens} tokens a rank", ours, theirs, blocks)
        require_equal(row.name, np.asarray(last["ours"]), last["theirs"])
        require_equal(row.name, out, last["out"])
        last.clear()
    return row


def require_equal(name: str, ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> None:
    """A row whose results differ is no measurement."""
    if ours.tobytes() != theirs.tobytes():
        raise SystemExit(f"{name}: the results differ")


def main() -> None:
    """Prints the table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=15)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    comm = xccl.init(comm=MPI.COMM_WORLD)
    pinned = comm.size <= len(cores)
    if pinned:
        os.sched_setaffinity(0, {cores[comm.rank]})
    rows = [
        all_to_all(comm, nbytes, symmetric, options.blocks)
        for nbytes in (8, 1024, 16384, 262144, 1048576)
        for symmetric in (False, True)
    ]
    rows += [moe(comm, tokens, options.blocks) for tokens in (8, 32, 128)]
    if comm.rank == 0:
        library = MPI.Get_library_version().split("\n")[0].split(",")[0].strip()
        sys.stdout.write(
            f"{comm.size} ranks, {len(cores)} cores, {'pinned' if pinned else 'not pinned'}, {platform.machine()}, "
            f"against {library} through mpi4py, median of {options.blocks} blocks\n\n"
            "| operation | xccl µs | MPI µs | ratio |\n|---|---|---|---|\n"
            + "\n".join(row.text() for row in rows)
            + "\n"
        )
    comm.close()


if __name__ == "__main__":
    main()
