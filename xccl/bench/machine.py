"""Where a run takes place: cores, pinning, versions."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import xccl
from xccl.bench.libraries import Library
from xccl.communicator import Communicator


@dataclass(frozen=True)
class Machine:
    """What the header of a run says.

    Attributes
    ----------
    cores : list of int
        Those that the ranks together may use.
    pinned : list of int
        The core of each rank; empty if the ranks are not pinned.
    """

    host: str
    cores: list[int]
    ranks: int
    pinned: list[int]
    versions: str

    @property
    def oversubscribed(self) -> bool:
        """More ranks than cores."""
        return self.ranks > len(self.cores)


def place(comm: Communicator, pin: bool | None, library: Library | None = None) -> Machine:
    """Pins this rank if asked to, or by default if each rank can have a core. Collective."""
    own = np.zeros(os.cpu_count() or 1, np.uint8)
    own[[core for core in os.sched_getaffinity(0) if core < own.size]] = 1
    allowed = comm.all_gather(own)
    cores = [int(core) for core in np.flatnonzero(allowed.any(axis=0))]
    if pin is None:
        pin = comm.size <= len(cores)
    pinned: list[int] = []
    if pin:
        pinned = [cores[rank % len(cores)] for rank in range(comm.size)]
        os.sched_setaffinity(0, {pinned[comm.rank]})
    elif (allowed.sum(axis=1) == 1).all():  # by the launcher, as Intel MPI does
        pinned = [int(core) for core in allowed.argmax(axis=1)]
    return Machine(_host(), cores, comm.size, pinned, _versions(library))


def _host() -> str:
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = f"{line.partition(':')[2].strip()}, {model}"
            break
    return model


def _versions(library: Library | None) -> str:
    versions = [
        f"xccl {xccl.__version__}",
        f"Python {platform.python_version()}",
        f"NumPy {np.__version__}",
        f"Linux {platform.release()}",
    ]
    if library is not None:
        versions.append(library.version)
    return ", ".join(versions)
