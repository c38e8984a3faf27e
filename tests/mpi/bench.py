"""Every operation of xccl.bench and its twin over MPI, with few calls: both must be right."""

from __future__ import annotations

import xccl
from xccl.bench import runner
from xccl.bench.operations import OPERATIONS
from xccl.bench.settings import Settings

FEW = {"begin": 8, "end": 1 << 13, "factor": 1024, "warmup": 1, "iterations": 3, "blocks": 2, "pin": False}
FEW |= {"tokens": (3,), "shape": "qwen3", "versus": "mpi"}

with xccl.init() as comm:
    rows = []
    for name, operation in OPERATIONS.items():
        if comm.size >= operation.min_ranks:
            rows += runner.run(comm, Settings(name, **FEW))[1]
    for name in ("moe", "combine"):
        for dtype in ("bfloat16", "float32"):
            for workload in ("empty-rank", "hot-expert"):
                rows += runner.run(comm, Settings(name, dtype=dtype, workload=workload, **FEW))[1]
    for name in ("dispatch", "combine", "moe"):
        rows += runner.run(comm, Settings(name, **(FEW | {"versus": "mpi-packed"})))[1]
    wrong = [row for row in rows if row.wrong]
    if wrong:
        raise SystemExit("\n".join(map(str, wrong)))
    if any(row.theirs is None for row in rows):
        raise SystemExit("a row without MPI")
    if comm.rank == 0:
        print("all equal")
