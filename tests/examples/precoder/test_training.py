"""Data-parallel training: any number of ranks gives the same, interruptions change nothing, failures are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from program import command, environment, here, run, succeed

torch = pytest.importorskip("torch", reason="the extra xccl[precoder] is not installed")
pytest.importorskip("rich", reason="the extra xccl[precoder] is not installed")

from precoder.config import TASKS  # noqa: E402
from precoder.train import settled_process  # noqa: E402
from precoder.trainer import Trainer  # noqa: E402

import xccl  # noqa: E402

SMALL = ("train", "k4", "--batch", "16", "--precision", "float64")


def checkpoint(folder: Path) -> dict[str, object]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_equal_bits(first: dict[str, object], second: dict[str, object]) -> None:
    assert first["step"] == second["step"]
    assert first["losses"] == second["losses"]
    for name in ("parameters", "average"):
        assert torch.equal(first[name], second[name]), name


def start_ranks(ranks: int, *program: str | Path) -> list[str]:
    return [sys.executable, "-m", "xccl", "run", "-n", str(ranks), "--timeout", "100", *map(str, program)]


def gradient(comm: xccl.Communicator) -> np.ndarray:
    # 10 samples: on 4 ranks the slices are of 2, 3, 2 and 3.
    config = replace(TASKS["mixed"], precision="float64", batch=10, users=(4,))
    with settled_process():
        trainer = Trainer(config, comm)
        trainer.compute_gradient(step=3)
        result = trainer.shared.copy()
        trainer.close()
    return result


def test_gradient_does_not_depend_on_the_number_of_ranks() -> None:
    one, two, four = (xccl.run(gradient, ranks, timeout=60) for ranks in (1, 2, 4))
    assert np.abs(one[0]).max() > 1e-3
    for own in (*two, *four):
        assert np.abs(one[0] - own).max() <= 1e-12


def test_20_steps_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    for ranks in (1, 2, 4):
        assert here(*SMALL, "--steps", "20", "-n", ranks, "--out", tmp_path / str(ranks)) == 0
    one, two, four = (checkpoint(tmp_path / str(ranks))["parameters"] for ranks in (1, 2, 4))
    assert (one - two).abs().max() <= 1e-12
    assert (one - four).abs().max() <= 1e-12


def test_started_alone_or_by_xccl_run_it_is_the_same_program(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = (*SMALL, "--steps", "3", "--out")
    assert here(*arguments, tmp_path / "own", "-n", "2") == 0
    succeed(start_ranks(2, "-m", "precoder", *arguments, tmp_path / "run"))
    assert_equal_bits(checkpoint(tmp_path / "own"), checkpoint(tmp_path / "run"))
    assert here(*arguments, tmp_path / "alone") == 0
    assert "3 steps in" in capfd.readouterr().err
    assert checkpoint(tmp_path / "alone")["ranks"] == 1


def test_training_learns(tmp_path: Path) -> None:
    assert here("train", "k4", "--batch", "64", "--steps", "60", "--samples", "64", "--out", tmp_path) == 0
    losses = checkpoint(tmp_path)["losses"]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1


def children(pid: int) -> list[int]:
    return sorted(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


def test_a_killed_rank_ends_all_and_the_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    arguments = (*SMALL, "--steps", "100", "--checkpoint-every", "10", "-n", "2", "--out")
    assert here(*arguments, tmp_path / "whole") == 0
    broken = tmp_path / "broken"
    with subprocess.Popen(
        command(*arguments, broken), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(broken / "checkpoint.pt", process)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1" in errors
    assert "killed by SIGKILL" in errors
    assert not (broken / "model.pt").exists()
    assert checkpoint(broken)["step"] < 100
    assert here(*arguments, broken, "--resume") == 0
    assert_equal_bits(checkpoint(tmp_path / "whole"), checkpoint(broken))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--steps", "0"), "steps is at least 1, got 0"),
        (("train", "--batch", "-3"), "batch is at least 1, got -3"),
        (("train", "--rate", "0"), "rate is positive, got 0.0"),
        (("train", "--samples", "0"), "samples is at least 1, got 0"),
        (("train", "--antennas", "0"), "needs users and antennas"),
        (("train", "--network", "mlp"), "a network is one of upe-phase"),
        (("train", "--checkpoint-every", "0"), "--checkpoint-every is at least 1"),
        (("train", "-n", "0"), "the number of ranks is 1 to"),
        (("train", "nothing"), "invalid choice: 'nothing'"),
        (("train", "--resume"), "checkpoint.pt does not exist"),
        (("report",), "no finished run"),
    ],
)
def test_wrong_arguments_are_told(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert here(*arguments) == 2
    assert message in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_more_ranks_than_samples_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert here("train", "k4", "--batch", "1", "-n", "2", "--out", tmp_path) == 1
    assert "a batch of 1 cannot be cut over 2 ranks" in capfd.readouterr().err


def test_ranks_are_not_started_by_a_rank(tmp_path: Path) -> None:
    done = run(start_ranks(1, "-m", "precoder", "train", "-n", "2", "--out", tmp_path))
    assert done.returncode == 2
    assert "started by xccl run: leave -n out" in done.stderr


def test_checkpoint_of_another_configuration_or_no_checkpoint_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert here(*SMALL, "--steps", "1", "--out", tmp_path) == 0
    assert here(*SMALL, "--steps", "2", "--out", tmp_path, "--resume") == 2
    assert "other settings (now, then): steps: 2, 1" in capfd.readouterr().err
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    assert here(*SMALL, "--steps", "1", "--out", tmp_path, "--resume") == 2
    assert "is not a file that precoder wrote" in capfd.readouterr().err
