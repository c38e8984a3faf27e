"""Limits that a container sets: control groups of version 2 and 1."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

_CGROUP = "sys/fs/cgroup"
_UNLIMITED = 1 << 60  # version 1 writes "no limit" as a number near 2^63


@dataclass(frozen=True)
class Limits:
    """What this process may use at most; None: no limit of its own.

    Attributes
    ----------
    cpus : float
        Cores' worth of time (docker --cpus).
    memory, memory_used : int
        Bytes; pages of shared memory count.
    pids : int
        Processes and threads.
    """

    cpus: float | None = None
    memory: int | None = None
    memory_used: int | None = None
    pids: int | None = None


def usable_cores() -> int:
    """Cores that ranks on this machine share: the affinity mask, or fewer if a quota of time allows less."""
    cores = len(os.sched_getaffinity(0))
    quota = read_limits().cpus
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def oom_kills(root: Path = Path("/")) -> int:
    """Processes that the kernel has killed in this process's control group because memory ran out."""
    counts = [
        int(words[1])
        for folder in _folders(root, "memory")
        for name in ("memory.events", "memory.oom_control")
        for line in _text(folder / name).splitlines()
        if len(words := line.split()) == 2 and words[0] == "oom_kill" and words[1].isdigit()
    ]
    return max(counts, default=0)


def read_limits(root: Path = Path("/")) -> Limits:
    """The tightest limit of the control groups that this process is in; `root` has proc and sys."""
    cpu, memory, pids = (_folders(root, controller) for controller in ("cpu", "memory", "pids"))
    tightest = min(
        ((limit, folder) for folder in memory if (limit := _bytes(folder, "memory.max", "memory.limit_in_bytes"))),
        default=(None, root),
    )
    return Limits(
        cpus=min((quota for folder in cpu if (quota := _quota(folder))), default=None),
        memory=tightest[0],
        memory_used=_bytes(tightest[1], "memory.current", "memory.usage_in_bytes"),
        pids=min((most for folder in pids if (most := _bytes(folder, "pids.max", "pids.max"))), default=None),
    )


def _folders(root: Path, controller: str) -> list[Path]:
    """Folders of this process's group for `controller` and of all groups around it."""
    folders = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            top = root / _CGROUP
        elif controller in controllers.split(","):
            top = root / _CGROUP / controller
        else:
            continue
        # In a container the path may be that of the host, which is not mounted: the top is the own group then.
        group = top / path.strip("/")
        folders += [group, *(parent for parent in group.parents if parent.is_relative_to(top))]
    return folders


def _quota(folder: Path) -> float | None:
    words = _text(folder / "cpu.max").split() or [
        _text(folder / "cpu.cfs_quota_us").strip(),
        _text(folder / "cpu.cfs_period_us").strip(),
    ]
    try:
        quota, period = float(words[0]), float(words[1])
    except (ValueError, IndexError):
        return None  # "max": no quota
    return quota / period if quota > 0 and period > 0 else None


def _bytes(folder: Path, *names: str) -> int | None:
    for name in names:
        text = _text(folder / name).strip()
        if text.isdigit() and int(text) < _UNLIMITED:
            return int(text)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
