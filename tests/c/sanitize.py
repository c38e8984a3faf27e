"""Builds the C tests with a sanitizer and runs them: `python tests/c/sanitize.py {address,undefined,thread} ...`.

With --package also runs a part of the Python tests on an extension that is built with AddressSanitizer or UBSan.
ThreadSanitizer sees races only between threads, so the ranks of threads_world.c are threads of one process that share
one mapping.
"""

from __future__ import annotations

import argparse
import os
import re
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
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1:history_size=4",
}


# The operations of fuzz_control.c.
FUZZED = tuple(re.findall(r'\{"(\w+)", use_\w+, ', (HERE / "fuzz_control.c").read_text()))


def flags_of(sanitizer: str) -> list[str]:
    """Compiler flags of "address", "undefined", "thread", or several with commas."""
    flags = [f"-fsanitize={sanitizer}"]
    if "undefined" in sanitizer:
        flags.append("-fno-sanitize-recover=undefined")
    # inlined copies would escape the sanitizer: it intercepts the functions
    flags += ["-fno-builtin-memcpy", "-fno-builtin-memmove", "-fno-builtin-memset"]
    if sanitizer == "thread":
        flags.append("-Wno-tsan")  # fences order only `sleeping` and `bell`, see wait.c, which guard no data
    return flags


def is_available(sanitizer: str) -> bool:
    """The compiler can link with the sanitizer."""
    command = ["cc", *flags_of(sanitizer), "-x", "c", "-", "-o", "/dev/null"]
    return subprocess.run(command, input="int main(void) { return 0; }", text=True, capture_output=True).returncode == 0


def build(sanitizer: str, where: Path) -> dict[str, Path]:
    """The programs of this folder, built with the sanitizer, by name."""
    compiler = os.environ.get("CC", "ccache gcc" if shutil.which("ccache") else "cc").split()
    flags = [*FLAGS, f"-I{CSRC}", *flags_of(sanitizer)]
    core = sorted(CSRC.glob("*.c"))
    parts = ("ring", "copy", "cache", "chaos", "chaos_puts", "status")  # chaos is called, but off
    ring = [HERE / "ring_race.c", HERE / "ring_harness.c", *(CSRC / f"{name}.c" for name in parts)]
    sources = {"threads_world": [HERE / "threads_world.c", *core], "ring_race": ring}
    if "address" in sanitizer:
        sources["fuzz_control"] = [HERE / "fuzz_control.c", *core]
    where.mkdir(parents=True, exist_ok=True)
    objects = {}
    for file in sorted({file for files in sources.values() for file in files}):
        objects[file] = str(where / f"{file.stem}.o")
        subprocess.run([*compiler, *flags, "-c", str(file), "-o", objects[file]], check=True)
    programs = {}
    for name, files in sources.items():
        programs[name] = where / f"{name}-{sanitizer}"
        subprocess.run([*compiler, *flags, *(objects[file] for file in files), "-o", str(programs[name])], check=True)
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


# What the extension is tested with: everything that hands addresses and counts to C.
PACKAGE_TESTS = ["gas", "heap", "entry", "prepared", "coll", "coll_errors", "p2p", "p2p_random", "request"]
PACKAGE_TESTS += ["kernel", "moe_layout", "moe_errors", "expert_parallel", "threads", "damaged_header"]
PACKAGE_TESTS += ["attention_expert", "attention_expert_errors"]


def test_package(sanitizer: str, where: Path) -> None:
    """Builds the package in a copy of the tree and runs its tests there."""
    root = HERE.parent.parent
    copy = where / "package"
    shutil.rmtree(copy, ignore_errors=True)
    for part in ("csrc", "xccl", "tests"):
        shutil.copytree(
            root / part, copy / part, ignore=shutil.ignore_patterns("*.so", "*.o", "_core.c", "__pycache__")
        )
    for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / part, copy / part)
    flags = ["-O1", "-g", "-fno-omit-frame-pointer", *flags_of(sanitizer)]
    build_ext = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build_ext, cwd=copy, check=True, env={**os.environ, "CFLAGS": " ".join(flags)})
    libraries = {"address": "libasan.so", "undefined": "libubsan.so"}
    preload = [
        subprocess.run(
            ["gcc", f"-print-file-name={libraries[part]}"], check=True, capture_output=True, text=True
        ).stdout
        for part in sanitizer.split(",")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(line.strip() for line in preload),
        "ASAN_OPTIONS": "detect_leaks=0,handle_segv=0",  # CPython leaks at exit; some tests die of SIGSEGV on purpose
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(copy),
    }
    files = [f"tests/test_{name}.py" for name in PACKAGE_TESTS]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    subprocess.run(pytest, cwd=copy, check=True, env=environment)


def main() -> int:
    """Builds, runs, reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sanitizers", nargs="+", choices=["address", "undefined", "thread", "address,undefined"])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 5, 8])
    parser.add_argument("--fuzz", type=int, default=0, help="seeds of fuzz_control for each operation (with address)")
    parser.add_argument("--package", action="store_true", help="also test the Python package (not with thread)")
    arguments = parser.parse_args()
    root = HERE.parent.parent / "build" / "sanitizers"
    for sanitizer in arguments.sanitizers:
        programs = build(sanitizer, root / sanitizer)
        jobs: list[tuple[str, list[object]]] = [("ring_race", [arguments.rounds * 2000])]
        for ranks in arguments.ranks:
            jobs += [("threads_world", [ranks, arguments.rounds, seed]) for seed in range(arguments.seeds)]
        if "address" in sanitizer and arguments.fuzz:
            jobs += [("fuzz_control", [operation, 0, arguments.fuzz]) for operation in FUZZED]
        for name, numbers in jobs:
            try:
                run(programs[name], numbers, 600 + arguments.fuzz)
            except subprocess.CalledProcessError as error:
                print(error.stdout)
                print(f"{name} {' '.join(map(str, numbers))} under {sanitizer}: exit status {error.returncode}")
                return 1
            print(f"{name} {' '.join(map(str, numbers))} under {sanitizer}: no report", flush=True)
        if arguments.package:
            test_package(sanitizer, root / sanitizer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
