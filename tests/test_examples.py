"""The examples do what they say, on more and fewer ranks than cores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_program(program: Path, ranks: int, *options: str) -> str:
    """Output of `xccl run`; fails the test with all output if a rank fails or hangs."""
    command = [sys.executable, "-m", "xccl", "run", "-n", str(ranks), "--timeout", "60", *options, str(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ring.py", "round the ring of {n} ranks: {sum} by send/recv, {sum} by put/signal\n"),
        ("moe_layer.py", "{n} ranks, 8 experts: equal to the dense layer within 1e-4\n"),
        ("own_protocol.py", "100 all-to-alls between {n} ranks: every row arrived\n"),
    ],
)
def test_python_example(name: str, expected: str, ranks: int) -> None:
    output = run_program(ROOT / "examples" / name, ranks)
    assert output == expected.format(n=ranks, sum=ranks * (ranks - 1) // 2)


@pytest.mark.parametrize(("ranks", "left", "experts"), [(1, 1, 8), (2, 1, 4), (4, 3, 6)])
def test_elastic_example(ranks: int, left: int, experts: int) -> None:
    output = run_program(ROOT / "examples" / "elastic_moe.py", ranks, "--keep-going")
    assert output == (
        f"20 steps, {ranks} ranks at the start and {left} at the end, with {experts} of 8 experts: "
        "equal to the dense layer within 1e-4\n"
    )


def test_c_example(tmp_path: Path) -> None:
    program = tmp_path / "c_ring"
    sources = [ROOT / "examples" / "c_ring.c", *sorted((ROOT / "csrc").glob("*.c"))]
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wshadow", "-Werror", f"-I{ROOT / 'csrc'}", "-pthread"]
    built = subprocess.run(["cc", *flags, *map(str, sources), "-o", program], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "rank 0 got: hello rank 0, this is rank 1",
        "rank 1 got: hello rank 1, this is rank 0",
    ]
