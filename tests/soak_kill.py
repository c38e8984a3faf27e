"""SIGKILL at random moments of a job's life: afterwards no process is left, and shared memory is empty.

    python tests/soak_kill.py --kills 100 --seed 1

Each seed chooses a way to start, a moment, and a victim among all processes of the job: launchers, shells and ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from xccl._object import sweep

RANKS = 3
MOST_SECONDS = 20.0  # until all have ended: far beyond the two seconds that are promised, for a loaded machine

# Every layer in turn, for ever: only the kill ends it.
RANK = """
import numpy as np, ml_dtypes, xccl

def main(comm):
    rng = np.random.default_rng(comm.rank)
    ep = xccl.ExpertParallel(comm, num_experts=6, hidden=64, num_topk=2, num_max_tokens_per_rank=8)
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    x = np.ones((8, 64), ml_dtypes.bfloat16)
    while True:
        a = comm.zeros(1000)
        sending = comm.isend(np.ones(20000), right)
        comm.recv(np.empty(20000), left)
        sending.wait()
        comm.all_reduce(np.ones(3000))
        group = comm.split(comm.rank % 2)
        group.barrier()
        group.close()
        rows, handle = ep.dispatch(x, rng.integers(0, 6, (8, 2)))
        ep.combine(rows, handle)
        comm.free(a)

if __name__ == "__main__":
    main(xccl.init())
"""
FORKING = "import sys, xccl; sys.path.insert(0, sys.argv[1]); import rank; xccl.run(rank.main, int(sys.argv[2]))"


@dataclass(frozen=True)
class Outcome:
    """What one kill led to; `problem` is empty if all went well."""

    seed: int
    start: str
    victim: str
    after: float
    ended_in: float
    swept: int
    problem: str = ""


def commands(start: str, folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    """The processes of a job, each with its variables: one launcher, or ranks without one."""
    program = [sys.executable, str(folder / "rank.py")]
    run = [sys.executable, "-m", "xccl", "run", "-n", str(RANKS)]
    if start == "xccl run":
        return [([*run, program[1]], {})]
    if start == "behind shells":  # two of them, so that the rank's parent is no child of the launcher
        return [([*run, "sh", "-c", f"sh -c '{' '.join(program)}; exit $?'; exit $?"], {})]
    if start == "xccl.run":
        return [([sys.executable, "-c", FORKING, str(folder), str(RANKS)], {})]
    job = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "soak", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": folder.name}
    return [(program, job | {"RANK": str(rank)}) for rank in range(RANKS)]


STARTS = ("xccl run", "behind shells", "xccl.run", "by name")


def kill_once(seed: int) -> Outcome:
    """Starts a job, kills one of its processes, and waits until all have ended."""
    rng = random.Random(seed)
    start, after = STARTS[seed % len(STARTS)], rng.uniform(0.02, 3.0)
    mark = secrets.token_hex(8)
    shm = Path(tempfile.mkdtemp(prefix="soak-", dir="/dev/shm"))
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as cleanup:
        cleanup.callback(os.rmdir, shm)
        (Path(name) / "rank.py").write_text(RANK)
        options = {"SOAK_MARK": mark, "XCCL_SHM_DIR": str(shm), "XCCL_TIMEOUT": "10", "XCCL_INIT_TIMEOUT": "5"}
        job = [
            subprocess.Popen(
                command, env=os.environ | options | more, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            for command, more in commands(start, Path(name))
        ]
        cleanup.callback(_end_all, mark, job)
        time.sleep(after)
        alive = _marked(mark)
        if not alive:
            return Outcome(seed, start, "", after, 0.0, 0, "the job ended by itself")
        # the first is the launcher, if there is one: as often as the ranks together
        victim = alive[0] if rng.random() < 0.5 else rng.choice(alive)
        what = _command_of(victim)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        begin = time.monotonic()
        while (left := _marked(mark)) and time.monotonic() - begin < MOST_SECONDS:
            for process in job:
                process.poll()
            time.sleep(0.02)
        ended_in = time.monotonic() - begin
        problem = f"still there: {[_command_of(pid) for pid in left]}" if left else ""
        _end_all(mark, job)
        swept = len(sweep(shm))
        if names := os.listdir(shm):
            problem += f" left in shared memory: {names}"
            for left_over in names:
                (shm / left_over).unlink()
    return Outcome(seed, start, what, after, ended_in, swept, problem.strip())


def _marked(mark: str) -> list[int]:
    """Living processes of the job, by a variable that all inherit."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                if f"SOAK_MARK={mark}".encode() in (process / "environ").read_bytes():
                    found.append(int(process.name))
    return sorted(found)


def _command_of(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return f"{pid} (gone)"
    return " ".join(Path(word.decode()).name for word in words if word)[:40]


def _end_all(mark: str, job: list[subprocess.Popen[bytes]]) -> None:
    for pid in _marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in job:
        process.wait()


def main() -> int:
    """Kills many times; exit code 1 if a process or an object was left once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the first kill; the others follow")
    options = parser.parse_args()
    outcomes = []
    for seed in range(options.seed, options.seed + options.kills):
        outcome = kill_once(seed)
        outcomes.append(outcome)
        print(
            f"seed {seed}: {outcome.start}, {outcome.victim!r} killed after {outcome.after:.2f} s, "
            f"all ended {outcome.ended_in:.2f} s later, {outcome.swept} swept {outcome.problem}",
            flush=True,
        )
    bad = [outcome.seed for outcome in outcomes if outcome.problem]
    slowest = max(outcome.ended_in for outcome in outcomes)
    print(f"{len(outcomes)} kills, {len(bad)} with leftovers {bad or ''}; the slowest end took {slowest:.2f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
