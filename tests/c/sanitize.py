"""Builds the C tests with a sanitizer and runs them: `python tests/c/sanitize.py {address,undefined,thread} ...`.

AddressSanitizer and UBSan also run the Python package: see `make asan`. ThreadSanitizer sees races only between
threads, so the ranks of threads_world.c are threads of one process that share one mapping.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
# -ffp-contract=off as in the package; frame pointers for whole call stacks in reports
FLAGS = ["-std=gnu11", "-O1", "-g", "-ffp-contract=off", "-fno-omit-frame-pointer", "-pthread", "-Wall", "-Wextra"]
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1:history_size=4",
}


def flags_of(sanitizer: str) -> list[str]:
    """Compiler flags of "address", "undefined", "thread", or several with commas."""
    flags = [f"-fsanitize={sanitizer}"]
    if "undefined" in sanitizer:
        flags.append("-fno-sanitize-recover=undefined")
    if sanitizer == "thread":
        flags.append("-Wno-tsan")  # fences order only `sleeping` and `bell`, see wait.c, which guard no data
    return flags


def build(sanitizer: str, where: Path) -> dict[str, Path]:
    """The programs of this folder, built with the sanitizer, by name."""
    compiler = os.environ.get("CC", "ccache gcc" if shutil.which("ccache") else "cc").split()
    flags = [*FLAGS, f"-I{CSRC}", *flags_of(sanitizer)]
    core = sorted(CSRC.glob("*.c"))
    sources = {"threads_world": [HERE / "threads_world.c", *core]}
    sources["ring_race"] = [HERE / "ring_race.c", HERE / "ring_harness.c", CSRC / "ring.c"]
    programs = {}
    for name, files in sources.items():
        objects = [where / name / file.with_suffix(".o").name for file in files]
        (where / name).mkdir(parents=True, exist_ok=True)
        for file, target in zip(files, objects, strict=True):
            subprocess.run([*compiler, *flags, "-c", str(file), "-o", str(target)], check=True)
        programs[name] = where / f"{name}-{sanitizer}"
        subprocess.run([*compiler, *flags, *map(str, objects), "-o", str(programs[name])], check=True)
    return programs


def run(program: Path, arguments: Iterable[object], timeout: float) -> None:
    """Runs it; raises CalledProcessError, with its output, on any report."""
    # gcc's ThreadSanitizer does not know the address layouts of newer kernels
    command = ["setarch", "-R"] if shutil.which("setarch") else []
    subprocess.run(
        [*command, str(program), *map(str, arguments)],
        check=True,
        env={**os.environ, **OPTIONS},
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def main() -> int:
    """Builds, runs, reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sanitizers", nargs="+", choices=["address", "undefined", "thread", "address,undefined"])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 5, 8])
    arguments = parser.parse_args()
    root = HERE.parent.parent / "build" / "sanitizers"
    for sanitizer in arguments.sanitizers:
        programs = build(sanitizer, root / sanitizer)
        jobs: list[tuple[str, list[int]]] = [("ring_race", [arguments.rounds * 5000])]
        for ranks in arguments.ranks:
            jobs += [("threads_world", [ranks, arguments.rounds, seed]) for seed in range(arguments.seeds)]
        for name, numbers in jobs:
            try:
                run(programs[name], numbers, 600)
            except subprocess.CalledProcessError as error:
                print(error.stdout)
                print(f"{name} {' '.join(map(str, numbers))} under {sanitizer}: exit status {error.returncode}")
                return 1
            print(f"{name} {' '.join(map(str, numbers))} under {sanitizer}: no report", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
