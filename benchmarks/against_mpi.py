"""Times xccl against mpi4py in the same processes, call by call in turn, and prints the table of the README.

    mpirun -n 2 python benchmarks/against_mpi.py [--blocks 15]

Times are medians over blocks of the slowest rank's mean time of a call; the blocks of the two libraries alternate.
Results of both are compared in every row.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from mpi4py import MPI

import xccl
from xccl.bench.libraries import library_name
from xccl.bench.machine import place
from xccl.bench.moe_twin import Twin
from xccl.bench.timing import calibrate, calls_block, interleave

BLOCK_SECONDS = 0.05  # longer than the default: rows of a README are measured once


@dataclass
class Row:
    """One line of the table: times in microseconds."""

    name: str
    ours: float
    theirs: float

    def text(self) -> str:
        """The row as Markdown."""
        return f"| {self.name} | {self.ours:.1f} | {self.theirs:.1f} | {self.ours / self.theirs:.2f} |"


def compare(
    comm: xccl.Communicator, name: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int
) -> Row:
    """Alternates blocks of both and takes medians."""
    blocks = [calls_block(lambda i, call=call: call()) for call in (ours, theirs)]
    repeats = [calibrate(comm, block, BLOCK_SECONDS) for block in blocks]
    mine, other = interleave(comm, blocks, repeats, rounds)
    return Row(name, statistics.median(mine), statistics.median(other))


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
        comm,
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
    out, other = np.empty_like(x), np.empty_like(x)
    with xccl.ExpertParallel(comm, num_experts, hidden, num_topk, tokens, quant="int8") as ep:
        twin = Twin(MPI.COMM_WORLD, MPI, num_experts, hidden, num_topk, ml_dtypes.bfloat16)
        last: dict[str, Any] = {}

        def ours() -> None:
            recv_x, handle = ep.dispatch(x, idx, weights)
            last["ours"] = recv_x
            ep.combine(recv_x, handle, out=out)

        def theirs() -> None:
            last["theirs"], route = twin.dispatch(x, idx, weights)
            twin.combine(last["theirs"], route, other)

        row = compare(comm, f"dispatch + combine, {tokens} tokens a rank", ours, theirs, blocks)
        require_equal(row.name, np.asarray(last["ours"]), last["theirs"])
        require_equal(row.name, out, other)
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
    comm = xccl.init(comm=MPI.COMM_WORLD)
    machine = place(comm, None)
    rows = [
        all_to_all(comm, nbytes, symmetric, options.blocks)
        for nbytes in (8, 1024, 16384, 262144, 1048576)
        for symmetric in (False, True)
    ]
    rows += [moe(comm, tokens, options.blocks) for tokens in (8, 32, 128)]
    if comm.rank == 0:
        sys.stdout.write(
            f"{comm.size} ranks, {len(machine.cores)} cores, {'pinned' if machine.pinned else 'not pinned'}, "
            f"{machine.host}, "
            f"against {library_name(MPI)} through mpi4py, median of {options.blocks} blocks\n\n"
            "| operation | xccl µs | MPI µs | ratio |\n|---|---|---|---|\n"
            + "\n".join(row.text() for row in rows)
            + "\n"
        )
    comm.close()


if __name__ == "__main__":
    main()
