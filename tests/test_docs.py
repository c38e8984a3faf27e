"""README and docs: every program in them runs and prints what the page says; what they refer to exists."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import xccl

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\S+)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Program:
    """A block ```python of a page, with the command and the output that follow it."""

    name: str
    source: str
    command: str = ""
    output: str | None = None


def programs() -> list[Program]:
    found: list[Program] = []
    for page in PAGES:
        first, last = len(found), -1
        for kind, text in FENCE.findall(page.read_text()):
            if kind == "python":
                found.append(Program(f"{page.name}-{len(found) - first + 1}", text))
                last = len(found) - 1
            elif kind in ("console", "output") and last >= 0:
                given = found[last]
                command = text if kind == "console" else given.command
                found[last] = Program(given.name, given.source, command, text if kind == "output" else None)
                last = last if kind == "console" else -1
            else:
                last = -1
    return found


@pytest.mark.parametrize("program", programs(), ids=lambda program: program.name)
def test_program_prints_what_the_page_says(program: Program, tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(program.source)
    command = [sys.executable, file]
    if "$ python" not in program.command:
        ranks = re.search(r"xccl run -n (\d+)", program.command)
        command[1:1] = ["-m", "xccl", "run", "-n", ranks.group(1) if ranks else "2", "--timeout", "60"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert program.output is not None, "a program in the docs is followed by its output"
    assert sorted(done.stdout.splitlines()) == sorted(program.output.splitlines())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)\)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_every_promise_of_the_memory_model_has_its_litmus_test() -> None:
    tests = set(re.findall(r"^def (test_\d\w+)", (ROOT / "tests" / "test_memory_model.py").read_text(), re.M))
    text = (ROOT / "docs" / "memory-model.md").read_text()
    rows = re.findall(r"^\* - (\d)\n(.*?)(?=^\* - |^```)", text, re.M | re.S)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    for number, row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named
        assert all(name.startswith(f"test_{number}_") for name in named), f"promise {number} names {named}"
    assert set(re.findall(r"`(test_\w+)`", text)) == tests


def test_every_source_file_has_its_line_in_the_layers_page() -> None:
    text = (ROOT / "docs" / "layers.md").read_text()
    patterns = ("csrc/*.[ch]", "csrc/*.py", "xccl/*.py", "xccl/serving/*.py", "xccl/bench/*.py")
    files = sorted({file.name for pattern in patterns for file in ROOT.glob(pattern)})
    missing = [name for name in files if f"`{name}`" not in text]
    assert not missing, "docs/layers.md says what each source file is about"


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "api.md").read_text() + " ".join(name for name in dir(xccl.errors) if "Xccl" in name)
    missing = [name for name in xccl.__all__ if not re.search(rf"\b{name}\b", text)]
    assert not missing, "docs/api.md has a place for each public name"
