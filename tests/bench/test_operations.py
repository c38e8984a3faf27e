"""Every operation moves the right bytes, on pairs and with a rank left over; a broken one is found out."""

from __future__ import annotations

import pytest
from support import ranks

import xccl
from xccl.bench import runner
from xccl.bench.operations import OPERATIONS
from xccl.bench.settings import Settings

FEW = {
    "begin": 8,
    "end": 1 << 13,
    "factor": 32,
    "warmup": 1,
    "iterations": 3,
    "blocks": 2,
    "pin": False,
    "tokens": (3,),
}


@pytest.mark.parametrize("symmetric", [False, True], ids=["ordinary", "symmetric"])
@pytest.mark.parametrize("name", OPERATIONS)
@ranks(2, 3)
def test_every_operation_is_right(comm: xccl.Communicator, name: str, symmetric: bool) -> None:
    machine, rows = runner.run(comm, Settings(name, symmetric=symmetric, **FEW))
    assert machine.ranks == comm.size
    assert rows
    for row in rows:
        assert row.wrong == 0
        assert row.ours.min > 0
        assert row.ours.p99 >= row.ours.p50 >= row.ours.min
        assert row.floor_us > 0


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float16", "int64"])
@pytest.mark.parametrize("name", ["all_reduce", "reduce_scatter", "all_to_all", "send"])
@ranks(3)
def test_every_dtype_is_right(comm: xccl.Communicator, name: str, dtype: str) -> None:
    _, rows = runner.run(comm, Settings(name, dtype=dtype, **FEW))
    assert sum(row.wrong for row in rows) == 0
