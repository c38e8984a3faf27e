"""Model checking with spin: the doorbell of wait.c and the ring of ring.h, and mutants that must be found wrong.

What the models say and leave out is in the .pml files. `pytest -s` (or `make models`) prints the states explored.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

MODELS = Path(__file__).parent
SECONDS = 120
MEGABYTES = 2048

pytestmark = pytest.mark.skipif(shutil.which("spin") is None, reason="needs spin: apt-get install spin")


@dataclass(frozen=True)
class Outcome:
    """What an exhaustive search of one model found."""

    errors: int
    states: int
    depth: int
    complete: bool
    text: str


def explore(model: str, defines: list[str], where: Path) -> Outcome:
    """Searches all states for failed assertions and for processes that can never go on."""
    subprocess.run(
        ["spin", "-a", *(f"-D{define}" for define in defines), str(MODELS / f"{model}.pml")], cwd=where, check=True
    )
    flags = ["-O1", "-w", "-DSAFETY", "-DCOLLAPSE", f"-DMEMLIM={MEGABYTES}"]
    subprocess.run(["cc", *flags, "-o", "pan", "pan.c"], cwd=where, check=True)
    search = ["./pan", "-m1000000"]
    text = subprocess.run(search, cwd=where, check=True, capture_output=True, text=True, timeout=SECONDS).stdout
    found = re.search(r"depth reached (\d+), errors: (\d+)\n\s*(\d+) states, stored", text)
    assert found is not None, text
    complete = "Search not completed" not in text and "max search depth too small" not in text
    return Outcome(int(found[2]), int(found[3]), int(found[1]), complete, text)


def report(capsys: pytest.CaptureFixture[str], name: str, outcome: Outcome) -> None:
    with capsys.disabled():
        print(f"\n  {name}: {outcome.states} states, depth {outcome.depth}, {outcome.errors} errors", end=" ")


SOUND = [
    ("doorbell", ["SLEEPER_MEMBARRIER=0", "RINGER_MEMBARRIER=0"]),
    ("doorbell", ["SLEEPER_MEMBARRIER=0", "RINGER_MEMBARRIER=1"]),
    ("doorbell", ["SLEEPER_MEMBARRIER=1", "RINGER_MEMBARRIER=0"]),
    ("doorbell", ["SLEEPER_MEMBARRIER=1", "RINGER_MEMBARRIER=1"]),
    ("doorbell", ["SLEEPER_MEMBARRIER=1", "RINGER_MEMBARRIER=1", "VALUES=5"]),
    ("doorbell", ["REFUSED_LATER=1"]),
    ("ring", ["LINES=2", "LIMIT=4", "MESSAGES=10"]),
    ("ring", ["LINES=4", "LIMIT=4", "MESSAGES=9"]),
    ("ring", ["LINES=8", "LIMIT=4", "MESSAGES=7"]),
    ("ring", ["LINES=4", "LIMIT=8", "MESSAGES=9"]),
    ("pieces", ["LINES=2", "LIMIT=4", "MESSAGES=10"]),
    ("pieces", ["LINES=4", "LIMIT=8", "MESSAGES=8"]),
    ("pieces", ["LINES=8", "LIMIT=8", "MESSAGES=7"]),
    ("pieces", ["LINES=8", "LIMIT=13", "MESSAGES=6"]),
]

# The mutant, and how it shows: a wrong word is read, or somebody waits for ever.
MUTANTS = [
    ("doorbell", "NO_WAITER_FENCE", "invalid end state"),
    ("doorbell", "NO_WAITER_FENCE SLEEPER_MEMBARRIER=0 RINGER_MEMBARRIER=0", "invalid end state"),
    ("doorbell", "NO_RINGER_FENCE SLEEPER_MEMBARRIER=0", "invalid end state"),
    ("doorbell", "NO_RINGER_FENCE SLEEPER_MEMBARRIER=0 RINGER_MEMBARRIER=0", "invalid end state"),
    ("doorbell", "UNREGISTERED_RINGER", "invalid end state"),
    ("doorbell", "NO_NAP REFUSED_LATER=1", "invalid end state"),
    ("doorbell", "BELL_AFTER_LOOK", "invalid end state"),
    ("doorbell", "BELL_UNCHANGED", "invalid end state"),
    ("doorbell", "WAKE_BEFORE_STORE", "invalid end state"),
    ("ring", "TAIL_BEFORE_COPY", "assertion violated"),
    ("ring", "SEQUENCE_RELAXED", "assertion violated"),
    ("ring", "SEQUENCE_UNCHECKED", "assertion violated"),
    ("ring", "CAPACITY_TOO_LARGE", "assertion violated"),
    ("ring", "DATA_UNCOUNTED LINES=8", "assertion violated"),
    ("ring", "HAND_BACK_IGNORED LINES=16", "invalid end state"),
    ("ring", "RELEASE_TOO_LATE", "invalid end state"),
    ("pieces", "HALVES LINES=8", "invalid end state"),
    ("pieces", "HAND_BACK_NEVER LINES=8", "invalid end state"),
    ("pieces", "PASSED_OVER_UNCOUNTED", "assertion violated"),
    ("pieces", "TAIL_BEFORE_COPY", "assertion violated"),
    ("pieces", "ENDS_OF_NEXT", "invalid end state"),
]


@pytest.mark.parametrize(("model", "bounds"), SOUND, ids=["-".join([model, *bounds]) for model, bounds in SOUND])
def test_should_find_no_error_in_any_state(
    model: str, bounds: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = explore(model, bounds, tmp_path)
    report(capsys, f"{model} ({', '.join(bounds)})", outcome)
    assert outcome.errors == 0, outcome.text
    assert outcome.complete, outcome.text


@pytest.mark.parametrize(("model", "mutant", "symptom"), MUTANTS)
def test_should_find_the_mutant_wrong(
    model: str, mutant: str, symptom: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = explore(model, mutant.split(), tmp_path)
    report(capsys, f"{model} with {mutant}", outcome)
    assert outcome.errors == 1
    assert symptom in outcome.text, outcome.text


@pytest.mark.parametrize("model", ["doorbell", "ring", "pieces"])
def test_should_run_every_mutant_that_the_model_has(model: str) -> None:
    text = (MODELS / f"{model}.pml").read_text()
    switches = set(re.findall(r"(?:#ifn?def |defined\()(\w+)", text)) - set(
        re.findall(r"#ifndef (\w+)\n#define \1", text)
    )
    assert switches == {mutant.split()[0] for of, mutant, _ in MUTANTS if of == model}
