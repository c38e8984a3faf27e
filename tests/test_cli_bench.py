"""`xccl bench`: what it prints and writes, how it is started, what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FEW = ["-w", "1", "-i", "2", "--blocks", "2", "--no-pin"]


def _run(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("XCCL_")}
    command = [sys.executable, "-m", "xccl", *launcher, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)


def test_prints_a_header_and_a_row_for_each_size() -> None:
    done = _run("bench", "all_to_all", "-n", "3", "-b", "1K", "-e", "16K", "-f", "4", *FEW)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    for word in ("ranks: 3, not pinned", "cores", "xccl 0.", "size: bytes of x on a rank", "cache line", "#wrong"):
        assert word in header
    rows = [line.split() for line in lines if not line.startswith("#")]
    assert [int(row[0]) for row in rows] == [1020, 4092, 16380]  # whole elements for each of 3 ranks
    assert all(row[2] == "float32" and row[-1] == "0" for row in rows)


def test_pins_each_rank_to_a_core_if_asked_to() -> None:
    done = _run("bench", "barrier", "-n", "3", *FEW[:-1], "--pin")
    assert done.returncode == 0, done.stderr
    assert "ranks: 3, pinned to cores" in done.stdout


def test_json_holds_settings_machine_and_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = _run("bench", "send", "-b", "8", "-e", "64", "-f", "8", "--dtype", "int8", "--json", file, *FEW)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    assert content["settings"]["operation"] == "send"
    assert content["machine"]["ranks"] == 2
    assert [(row["size"], row["dtype"], row["ours"]["wrong"]) for row in content["rows"]] == [
        (8, "int8", 0),
        (64, "int8", 0),
    ]
    assert all(row["algbw"] > 0 and row["ratio"] is None for row in content["rows"])


def test_the_moe_rows_say_how_uneven_the_ranks_are() -> None:
    done = _run("bench", "moe", "--shape", "qwen3", "--workload", "hot-rank", "--tokens", "1,3", "--seed", "7", *FEW)
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stdout.splitlines() if "max/mean" in line]
    assert len(notes) == 2
    assert all("qwen3: hidden 2048, top-8 of 128; hot-rank, seed 7" in note for note in notes)


def test_draws_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "rows.png"
    done = _run("bench", "all_to_all", "-b", "64", "-e", "256", "--plot", file, *FEW)
    assert done.returncode == 0, done.stderr
    assert file.read_bytes().startswith(b"\x89PNG")


def test_takes_the_ranks_of_a_launcher(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    launcher = ("run", "-n", "3", "-m", "xccl.bench")
    done = _run("all_gather", "-b", "96", "-e", "96", "--json", file, *FEW, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ranks: 3") == 1
    assert len(json.loads(file.read_text())["rows"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["teleport"], "invalid choice: 'teleport'"),
        (["send", "-b", "8MB"], "a size is a number of bytes such as 8, 64K, 8M or 1G, got '8MB'"),
        (["send", "-b", "16", "-e", "8"], "the last size, 8, is smaller than the first, 16"),
        (["send", "-f", "1"], "factor is at least 2, got 1"),
        (["send", "-n", "1"], "send needs at least 2 ranks, got 1: give -n"),
        (["send", "-n", "0"], "the number of ranks is 1 to 4096, got 0"),
        (["send", "--dtype", "float8"], "invalid choice: 'float8'"),
        (["moe", "--dtype", "float64"], "--dtype of moe is one of int8, bfloat16, float32, got float64"),
        (["moe", "--tokens", "1;2"], "numbers with commas between them"),
        (["moe", "--workload", "cold"], "invalid choice: 'cold'"),
        (["moe", "--prepared"], "--prepared is for put, get, put_signal, send,"),
        (["send", "--pin", "--no-pin"], "not allowed with"),
        (["put", "--vs", "gloo"], "gloo has no put; --vs gloo is for send, bandwidth,"),
        (["all_to_all", "-n", "4", "--vs", "mpi"], "mpirun -n 4 python -m xccl.bench all_to_all --vs mpi"),
    ],
)
def test_wrong_command_lines_are_explained(arguments: list[str], message: str) -> None:
    done = _run("bench", *arguments)
    assert message in done.stderr
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["send", "--vs", "mpi"], "--vs mpi needs ranks that mpirun started, not xccl run: mpirun -n 2 python"),
        (["send", "-n", "3"], "-n 3, but the launcher started 2 ranks: leave out -n"),
    ],
)
def test_what_does_not_fit_the_launcher_is_explained(arguments: list[str], message: str) -> None:
    done = _run(*arguments, *FEW, launcher=("run", "-n", "2", "-m", "xccl.bench"))
    assert message in done.stderr
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
