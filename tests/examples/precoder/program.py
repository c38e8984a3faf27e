"""The example's command line for the tests: in this process, or in processes of its own.

In this process PyTorch is imported already, which takes longer than all else in these tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 120


def here(*arguments: str | Path | int) -> int:
    """Runs the command in this process, its ranks forked from it; returns the exit code."""
    from precoder.cli import main

    try:
        return main(list(map(str, arguments)))
    except SystemExit as leave:  # argparse
        return int(leave.code or 0)


def command(*arguments: str | Path | int) -> list[str]:
    return [sys.executable, "-m", "precoder", *map(str, arguments)]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "examples" / "precoder"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S)


def succeed(arguments: list[str]) -> str:
    done = run(arguments)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr
