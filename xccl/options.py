"""The one table of options: it makes the XCCL_* variables, `xccl.rc`, the printed help and the documentation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xccl.errors import XcclUsageError


@dataclass(frozen=True)
class Option:
    """One option: `rc.<name>` in Python, `XCCL_<NAME>` in the environment.

    `unit` is "s", "bytes" (accepts 64K, 16M, 2G), "count", "directory" (a path from the root, or nothing), "plan"
    (JSON or a path, read by xccl.faults), or a list of words such as "auto|scalar|avx2".
    """

    name: str
    default: float | int | str
    unit: str
    help: str

    @property
    def variable(self) -> str:
        """Name of the environment variable."""
        return "XCCL_" + self.name.upper()

    def parse(self, value: object) -> float | int | str:
        """The value in its unit; raises XcclUsageError with what is accepted."""
        try:
            return self._convert(value)
        except (TypeError, ValueError):
            raise XcclUsageError(
                f"{self.variable} (xccl.rc.{self.name}) takes {self._accepts()}, got {value!r}: {self.help}"
            ) from None

    def _convert(self, value: object) -> float | int | str:
        text = str(value).strip()
        if self.unit == "s":
            seconds = float(text)
            if not seconds > 0:
                raise ValueError(text)
            return seconds
        if self.unit in ("bytes", "count"):
            scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
            factor = scale.get(text[-1:].upper(), 1) if self.unit == "bytes" else 1
            number = int(text[:-1] if factor > 1 else text) * factor
            if number < 0:
                raise ValueError(text)
            return number
        if self.unit == "plan":
            return text
        if self.unit == "directory":
            if text and not os.path.isabs(text):
                raise ValueError(text)
            return text
        if text not in self.unit.split("|"):
            raise ValueError(text)
        return text

    def _accepts(self) -> str:
        units = {"s": "seconds > 0", "bytes": "bytes (64K, 16M, 2G)", "count": "a whole number >= 0"}
        units["directory"] = "a directory, written from the root"
        return units.get(self.unit, f"one of {self.unit}")


OPTIONS = (
    Option("timeout", 300.0, "s", "deadline of a blocking call that is given none"),
    Option(
        "first_timeout",
        0.0,
        "s",
        "as timeout, for the first operation of a rank: ranks may start unevenly; 0: twice the timeout",
    ),
    Option("init_timeout", 600.0, "s", "deadline for all ranks to start"),
    Option(
        "heap_size", 64 << 30, "bytes", "address space for symmetric arrays, per rank; pages are taken when allocated"
    ),
    Option("spin", 0, "count", "polls before a waiting rank yields its core; 0 measures whether the core is its own"),
    Option("yields", 0, "count", "yields before a waiting rank sleeps; 0 measures how long waits last"),
    Option(
        "p2p_slot_size",
        64 << 10,
        "bytes",
        "largest chunk of a message, and least that a symmetric array is read in place",
    ),
    Option("p2p_slots", 0, "count", "chunks that a ring holds, a power of two; 0: twice the L2 cache of a core"),
    Option(
        "simd", "auto", "auto|scalar|avx2|avx512", "vector instructions of dispatch and combine; all give the same bits"
    ),
    Option(
        "coll_block_size", 0, "bytes", "what collectives on ordinary arrays stage at once; 0: half of a core's L2 cache"
    ),
    Option(
        "cma",
        "auto",
        "auto|off",
        "auto: large messages between ordinary arrays are copied once by the kernel where that works and is faster",
    ),
    Option("racecheck", "0", "0|1", "1 looks for accesses to symmetric arrays that nothing orders; slow, for tests"),
    Option("faults", "", "plan", "faults to inject, as JSON or a file with it, see xccl.faults; for tests"),
    Option(
        "chaos",
        0,
        "count",
        "seed of random pauses where ranks meet, and of the order in which puts become visible, for tests; 0: off",
    ),
    Option(
        "shm_dir",
        "",
        "directory",
        "where the shared memory lies, on a tmpfs, and where ranks of mpirun and torchrun meet; empty: /dev/shm",
    ),
)

# Set by the launcher for its ranks; not options.
LAUNCH_VARIABLES = ("XCCL_RANK", "XCCL_WORLD_SIZE", "XCCL_FD", "XCCL_SESSION", "XCCL_LAUNCHER_PID")


class Rc:
    """Options of this process: attributes override the environment, which overrides the defaults.

    They are read when a world is created (xccl.init, xccl.run, xccl run); the creator's values hold for all
    its ranks. Setting an unknown name or a bad value raises XcclUsageError.
    """

    def __init__(self) -> None:
        object.__setattr__(self, "_set", {})
        object.__setattr__(self, "_table", {option.name: option for option in OPTIONS})

    def __getattr__(self, name: str) -> Any:
        option = self._find(name)
        if name in self._set:
            return self._set[name]
        text = os.environ.get(option.variable)
        return option.default if text is None else option.parse(text)

    def __setattr__(self, name: str, value: object) -> None:
        self._set[name] = self._find(name).parse(value)

    def __delattr__(self, name: str) -> None:
        self._set.pop(self._find(name).name, None)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return ((option.name, getattr(self, option.name)) for option in OPTIONS)

    def __repr__(self) -> str:
        return "xccl.rc(" + ", ".join(f"{name}={value!r}" for name, value in self) + ")"

    def _find(self, name: str) -> Option:
        table: Mapping[str, Option] = self._table
        if name not in table:
            if name.startswith("__"):
                raise AttributeError(name)
            raise XcclUsageError(f"xccl.rc has no option {name!r}; there are {', '.join(sorted(table))}")
        return table[name]


def check_environment() -> None:
    """Raises XcclUsageError for an XCCL_* variable that no option has: a misspelt one would be ignored otherwise."""
    known = {option.variable for option in OPTIONS} | set(LAUNCH_VARIABLES)
    for variable in os.environ:
        if variable.startswith("XCCL_") and variable not in known:
            options = ", ".join(option.variable for option in OPTIONS)
            raise XcclUsageError(f"unknown variable {variable}; there are {options}")


def options_text() -> str:
    """The table as text, for --help."""
    lines = [f"{option.variable:<24} {option.default!s:<14} {option.unit:<8} {option.help}" for option in OPTIONS]
    return "\n".join(["variable                 default        unit     meaning", *lines])


rc = Rc()
