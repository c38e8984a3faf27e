"""Every operation moves the right bytes, on pairs and with a rank left over; a broken one is found out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import pytest
from support import ranks

import xccl
from xccl import cli
from xccl.bench import runner
from xccl.bench.operation import Case
from xccl.bench.operations import OPERATIONS
from xccl.bench.settings import Settings
from xccl.bench.workload import WORKLOADS

FEW = {"begin": 8, "end": 1 << 13, "factor": 1024, "warmup": 1, "iterations": 3, "blocks": 2, "pin": False}
FEW |= {"tokens": (3,), "shape": "qwen3"}


@pytest.mark.parametrize("name", OPERATIONS)
@ranks(2, 3)
def test_every_operation_is_right(comm: xccl.Communicator, name: str) -> None:
    for symmetric in (False, True):
        machine, rows = runner.run(comm, Settings(name, symmetric=symmetric, **FEW))
        assert machine.ranks == comm.size
        assert rows
        for row in rows:
            assert row.wrong == 0
            assert row.ours.p99 >= row.ours.p50 >= row.ours.min > 0
            assert row.floor_us > 0


@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if operation.can_prepare])
@ranks(2, 3)
def test_prepared_operations_are_right(comm: xccl.Communicator, name: str) -> None:
    _, rows = runner.run(comm, Settings(name, prepared=True, **FEW))
    assert sum(row.wrong for row in rows) == 0


@pytest.mark.parametrize("name", ["all_reduce", "reduce_scatter", "all_to_all_v"])
@ranks(3)
def test_every_dtype_is_right(comm: xccl.Communicator, name: str) -> None:
    for dtype in OPERATIONS[name].dtypes:
        _, rows = runner.run(comm, Settings(name, dtype=dtype, **FEW))
        assert sum(row.wrong for row in rows) == 0


@pytest.mark.parametrize("name", ["barrier", "broadcast", "all_gather", "all_reduce", "all_to_all", "moe"])
@ranks(1)
def test_collectives_can_be_measured_alone(comm: xccl.Communicator, name: str) -> None:
    _, rows = runner.run(comm, Settings(name, **FEW))
    assert sum(row.wrong for row in rows) == 0


@ranks(3)
def test_every_workload_is_right(comm: xccl.Communicator) -> None:
    for workload in WORKLOADS:
        for dtype in ("int8", "bfloat16", "float32"):
            _, rows = runner.run(comm, Settings("moe", dtype=dtype, workload=workload, **FEW))
            assert sum(row.wrong for row in rows) == 0
            assert all(row.note is not None and workload in row.note for row in rows)


def _nothing(case: Case, i: int) -> None:
    """Does not communicate."""


def _one_element(case: Case, i: int) -> None:
    type(case).__mro__[1].run(case, i)
    for out, _ in case.results[i % case.buffers :][:1]:  # a rank may have none
        out[-1:] = 0


def _early_return(case: Case, i: int) -> None:
    """A barrier that nobody waits in, while rank 1 is late."""
    if case.comm.rank == 1:
        time.sleep(0.02)


def _lost_rows(case: Case, i: int) -> None:
    type(case).__mro__[1].run(case, i)
    recv_x = case.last[1]  # type: ignore[attr-defined]
    recv_x[0] = np.zeros_like(recv_x[0])


BROKEN = {name: _nothing for name in OPERATIONS if name not in ("barrier", "combine", "e2a", "put_signal")}
CASES: list[tuple[str, Callable[[Case, int], None]]] = [
    *BROKEN.items(),
    ("all_to_all", _one_element),
    ("all_reduce", _one_element),
    ("combine", _one_element),
    ("e2a", _one_element),
    ("ma_layer", _one_element),
    ("put_signal", _nothing),
    ("barrier", _early_return),
    ("dispatch", _lost_rows),
    ("moe", _lost_rows),
]


@pytest.mark.parametrize(("name", "run"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_operation_is_found_out(
    name: str,
    run: Callable[[Case, int], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    operation = OPERATIONS[name]
    broken = type("Broken", (operation.case,), {"run": run})
    monkeypatch.setitem(OPERATIONS, name, dataclasses.replace(operation, case=broken))
    flags = "-n 2 -b 64 -e 64 -w 1 -i 3 --blocks 2 --no-pin --tokens 3 --shape qwen3"
    assert cli.main(["bench", name, *flags.split()]) == 1
    row = capfd.readouterr().out.splitlines()[-2]
    assert int(row.split()[-1]) > 0, row
