"""The bounded share of mutation testing: every patch applies, every class has one, and a few are tried.

`make mutants` tries all of them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
CLASSES = 13  # of the catalogue


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants_run", HERE / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants_run"] = module
    spec.loader.exec_module(module)
    return module


runner = _load()
MUTANTS = runner.read_mutants()
# One of the allocator, one of the ring, one of sizes. XCCL_MUTANTS=all tries every one.
SHARE = ("01-", "09-", "12-32-bit-sizes")
TRIED = [m for m in MUTANTS if os.environ.get("XCCL_MUTANTS") == "all" or m.name.startswith(SHARE)]

needs_patch = pytest.mark.skipif(shutil.which("patch") is None, reason="needs patch: apt-get install patch")


def test_every_class_of_the_catalogue_has_a_mutant() -> None:
    assert {mutant.bug_class for mutant in MUTANTS} == set(range(1, CLASSES + 1))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_tests_of_a_mutant_exist(mutant: object) -> None:
    assert mutant.tests
    for test in mutant.tests:
        file, _, function = test.partition("::")
        assert re.search(rf"^def {function.partition('[')[0]}\(", (runner.ROOT / file).read_text(), re.M), test


@needs_patch
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_patch_applies(mutant: object, tmp_path: Path) -> None:
    shutil.copytree(runner.ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("*.o"))
    applied = subprocess.run(
        ["patch", "-p1", "--fuzz=1", "--dry-run", "-i", str(mutant.path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert applied.returncode == 0, f"stale: the code has moved on, make the patch anew\n{applied.stdout}"


@needs_patch
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", TRIED, ids=lambda mutant: mutant.name)
def test_the_mutant_is_killed(mutant: object) -> None:
    verdict = runner.run([mutant], baseline=False)[mutant.name]
    assert verdict.word == "killed", f"{verdict.word}\n{verdict.detail}"
