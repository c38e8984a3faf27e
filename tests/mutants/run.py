"""Mutation testing of the bug catalogue: `python tests/mutants/run.py [NAME...]`.

Each patch in this folder puts one bug into the C core. Its header says which class of the catalogue it stands for,
what it does, and which tests must fail with it. For each one a copy of the tree is patched and built, and those tests
are run:

    killed      a test failed or did not end in time, as it should
    survived    all tests passed: they do not see the bug
    stale       the patch no longer applies: the code has moved on, make the patch anew (a few lines of context suffice)
    broken      it does not build, or the tests it names do not exist

Before that all named tests must pass without a mutant. Exit status 0 if every mutant was killed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

MUTANTS = Path(__file__).parent
ROOT = MUTANTS.parent.parent
PARTS = ("csrc", "xccl", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")
SECONDS = 150  # for the tests of one mutant
PASSED, FAILED = 0, 1  # exit statuses of pytest


@dataclass(frozen=True)
class Mutant:
    """One patch and what its header says."""

    path: Path
    bug_class: int
    what: str
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        """File name without the suffix."""
        return self.path.stem


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant, and the output that shows it."""

    word: str
    detail: str = ""


def read_mutants(folder: Path = MUTANTS) -> list[Mutant]:
    """All patches, in the order of their names."""
    mutants = []
    for path in sorted(folder.glob("*.patch")):
        fields: dict[str, list[str]] = {"Class": [], "What": [], "Tests": []}
        for line in path.read_text().partition("\n---")[0].splitlines():
            key, _, value = line.partition(": ")
            if key in fields:
                fields[key].append(value)
        mutants.append(Mutant(path, int(fields["Class"][0]), fields["What"][0], tuple(fields["Tests"])))
    return mutants


def copy_tree(where: Path) -> None:
    """What it takes to build and test, without what a build left."""
    for part in PARTS:
        if (ROOT / part).is_dir():
            leftovers = shutil.ignore_patterns("*.so", "*.o", "_core.c", "__pycache__")
            shutil.copytree(ROOT / part, where / part, ignore=leftovers)
        else:
            shutil.copy(ROOT / part, where / part)


def build(tree: Path) -> subprocess.CompletedProcess[str]:
    """Builds the extension in the copy."""
    environment = dict(os.environ)
    if "CC" not in environment and shutil.which("ccache"):
        environment["CC"] = "ccache gcc"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def run_tests(tree: Path, tests: list[str], seconds: float) -> Verdict:
    """Runs tests in the copy: "passed", "killed" or "broken"."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "XCCL_TIMEOUT": "10",
        "HYPOTHESIS_STORAGE_DIRECTORY": "/dev/null",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    process = subprocess.Popen(
        command, cwd=tree, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate()
        return Verdict("killed", f"its tests did not end in {seconds} s")
    if process.returncode == PASSED:
        return Verdict("passed", output)
    return Verdict("killed" if process.returncode == FAILED else "broken", output)


def try_mutant(mutant: Mutant, clean: Path, where: Path) -> Verdict:
    """Patches, builds, tests."""
    shutil.copytree(clean, where, symlinks=True)
    # one line of context may differ; a patch that lands somewhere else would be another mutant
    patch = ["patch", "-p1", "--fuzz=1", "--no-backup-if-mismatch", "-i", str(mutant.path)]
    applied = subprocess.run(patch, cwd=where, capture_output=True, text=True)
    if applied.returncode != 0:
        return Verdict("stale", applied.stdout + applied.stderr)
    built = build(where)
    if built.returncode != 0:
        return Verdict("broken", built.stdout + built.stderr)
    verdict = run_tests(where, list(mutant.tests), SECONDS)
    return Verdict("survived", verdict.detail) if verdict.word == "passed" else verdict


def run(mutants: list[Mutant], baseline: bool = True) -> dict[str, Verdict]:
    """Tries the mutants; raises RuntimeError if the unchanged tree fails their tests."""
    verdicts = {}
    with tempfile.TemporaryDirectory(prefix="xccl-mutants-") as folder:
        clean = Path(folder) / "clean"
        clean.mkdir()
        copy_tree(clean)
        if baseline:
            built = build(clean)
            tests = sorted({test for mutant in mutants for test in mutant.tests})
            verdict = run_tests(clean, tests, SECONDS * len(mutants))
            if built.returncode != 0 or verdict.word != "passed":
                raise RuntimeError(f"without a mutant the tests do not pass:\n{built.stderr}\n{verdict.detail}")
        for mutant in mutants:
            start = time.monotonic()
            where = Path(folder) / mutant.name
            verdicts[mutant.name] = try_mutant(mutant, clean, where)
            shutil.rmtree(where)
            print(
                f"{verdicts[mutant.name].word:9} class {mutant.bug_class:2}  {mutant.name:32}"
                f" {time.monotonic() - start:5.0f} s  {mutant.what}",
                flush=True,
            )
    return verdicts


def main() -> int:
    """Tries the mutants named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of names; all mutants without any")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a mutant first")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the output of those that were not killed")
    arguments = parser.parse_args()
    wanted = [m for m in read_mutants() if not arguments.names or m.name.startswith(tuple(arguments.names))]
    verdicts = run(wanted, baseline=not arguments.no_baseline)
    bad = {name: verdict for name, verdict in verdicts.items() if verdict.word != "killed"}
    print(f"{len(verdicts) - len(bad)} of {len(verdicts)} mutants killed")
    for name, verdict in bad.items():
        print(f"\n--- {name}: {verdict.word}" + (f"\n{verdict.detail[-4000:]}" if arguments.verbose else ""))
    return 1 if bad or not verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
