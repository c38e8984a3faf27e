"""--vs gloo: every twin moves the right bytes, a broken one is found out, and what is missing is named."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
from support import ranks

import xccl
from xccl import cli
from xccl.bench import libraries, runner
from xccl.bench.operation import Case, Operation
from xccl.bench.operations import OPERATIONS
from xccl.bench.settings import Settings

FEW = {"begin": 8, "end": 1 << 13, "factor": 1024, "warmup": 1, "iterations": 3, "blocks": 2, "pin": False}
BY_GLOO = [name for name, operation in OPERATIONS.items() if "gloo" in operation.versus]
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")


@needs_torch
@ranks(2, 3, timeout=120)
def test_gloo_gives_the_same_as_xccl(comm: xccl.Communicator) -> None:
    for name in BY_GLOO:
        machine, rows = runner.run(comm, Settings(name, versus="gloo", **FEW))
        assert "gloo of torch" in machine.versions
        for row in rows:
            assert row.wrong == 0
            assert row.theirs is not None
            assert row.ratio == row.ours.p50 / row.theirs.p50 > 0


@needs_torch
@pytest.mark.parametrize("name", ["all_reduce", "reduce_scatter"])
@ranks(3, timeout=120)
def test_gloo_sums_every_dtype(comm: xccl.Communicator, name: str) -> None:
    for dtype in OPERATIONS[name].versus["gloo"].dtypes:
        _, rows = runner.run(comm, Settings(name, versus="gloo", dtype=dtype, **FEW))
        assert sum(row.wrong for row in rows) == 0


def _nothing(case: Case, i: int) -> None:
    """Does not communicate."""


def _with_broken_twin(name: str) -> Operation:
    gloo = OPERATIONS[name].versus["gloo"]
    broken: Any = type("Broken", (gloo.case,), {"run": _nothing})
    return dataclasses.replace(OPERATIONS[name], versus={"gloo": dataclasses.replace(gloo, case=broken)})


@needs_torch
@ranks(2, timeout=120)
def test_a_broken_twin_is_found_out(comm: xccl.Communicator) -> None:
    for name in BY_GLOO:
        if name != "barrier":
            OPERATIONS[name] = _with_broken_twin(name)  # in this rank's process only
            _, rows = runner.run(comm, Settings(name, versus="gloo", **FEW))
            assert [row.ours.wrong for row in rows] == [0, 0]
            assert all(row.theirs is not None and row.theirs.wrong > 0 for row in rows)


@needs_torch
def test_a_broken_twin_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    name = "all_to_all"
    monkeypatch.setitem(OPERATIONS, name, _with_broken_twin(name))
    flags = "-n 2 -b 64 -e 64 -w 1 -i 3 --blocks 2 --no-pin --vs gloo"
    assert cli.main(["bench", name, *flags.split()]) == 1
    row = capfd.readouterr().out.splitlines()[-2].split()
    assert int(row[-1]) > 0, row  # of the twin
    assert int(row[10]) == 0, row


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in BY_GLOO])
def test_what_gloo_cannot_do_is_said(name: str) -> None:
    with pytest.raises(xccl.XcclUsageError, match=rf"gloo has no {name}; --vs gloo is for send, bandwidth, barrier"):
        runner.find(Settings(name, versus="gloo"), 2)
    with pytest.raises(xccl.XcclUsageError, match="mpi-packed has no send; --vs mpi-packed is for dispatch, combine"):
        runner.find(Settings("send", versus="mpi-packed"), 2)


def test_a_dtype_that_gloo_cannot_sum_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries.Gloo, "require", lambda: None)
    with pytest.raises(xccl.XcclUsageError, match="gloo cannot do all_reduce of bfloat16: --dtype is one of int8"):
        runner.find(Settings("all_reduce", versus="gloo", dtype="bfloat16"), 2)


def test_without_torch_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "all_to_all", "--vs", "gloo"]) == 2
    assert "--vs gloo needs PyTorch: pip install 'xccl[torch]'" in capsys.readouterr().err
