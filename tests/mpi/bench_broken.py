"""Every operation of xccl.bench and its twin over MPI, broken in turn: each time the row says so, and the exit code."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

import xccl
from xccl import cli
from xccl.bench import runner
from xccl.bench.operation import Case
from xccl.bench.operations import OPERATIONS
from xccl.bench.settings import Settings

FEW = {"begin": 64, "end": 64, "warmup": 1, "iterations": 3, "blocks": 2, "pin": False}
FEW |= {"tokens": (3,), "shape": "qwen3"}


def nothing(case: Case, i: int) -> None:
    """Does not communicate."""


def broken(case: type[Case]) -> Any:
    return type("Broken", (case,), {"run": nothing})


def breakable() -> list[tuple[str, str]]:
    """Names of operations and libraries. Without arrays, a barrier shows by luck only that it does not wait."""
    return [(name, versus) for name in OPERATIONS if name != "barrier" for versus in OPERATIONS[name].versus]


def check(comm: xccl.Communicator, name: str, versus: str) -> None:
    """Breaks the twin, then xccl's own case where the rest of the case survives it."""
    operation = OPERATIONS[name]
    twin = operation.versus[versus]
    changed = {versus: dataclasses.replace(twin, case=broken(twin.case))}
    OPERATIONS[name] = dataclasses.replace(operation, versus=changed)
    _, rows = runner.run(comm, Settings(name, versus=versus, **FEW), silent=True)
    if any(row.theirs is None or row.theirs.wrong == 0 or row.ours.wrong != 0 for row in rows):
        raise SystemExit(f"{name}: broken {versus}, not seen: {rows}")
    if name not in ("combine", "e2a", "put_signal"):
        OPERATIONS[name] = dataclasses.replace(operation, case=broken(operation.case))
        _, rows = runner.run(comm, Settings(name, versus=versus, **FEW), silent=True)
        if any(row.ours.wrong == 0 or row.theirs is None or row.theirs.wrong != 0 for row in rows):
            raise SystemExit(f"{name}: broken, not seen beside {versus}: {rows}")
    OPERATIONS[name] = operation


with xccl.init() as comm:
    for name, versus in breakable():
        if versus != "gloo":
            check(comm, name, versus)
    rank = comm.rank

operation = OPERATIONS["all_to_all"]
flags = "--vs mpi -b 64 -e 64 -w 1 -i 3 --blocks 2 --no-pin"
arguments = ["bench", "all_to_all", *flags.split()]
sys.stdout.flush()
if cli.main(arguments) != 0:
    raise SystemExit("right results, but not exit code 0")
twin = dataclasses.replace(operation.versus["mpi"], case=broken(operation.versus["mpi"].case))
OPERATIONS["all_to_all"] = dataclasses.replace(operation, versus={"mpi": twin})
if cli.main(arguments) != 1:
    raise SystemExit("wrong results, but not exit code 1")
if rank == 0:
    os.write(1, b"all equal\n")
