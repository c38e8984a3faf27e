"""The libraries that --vs compares with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from xccl.communicator import Communicator
from xccl.errors import XcclUsageError


class Library(ABC):
    """Another communication library, started on the same ranks. Making one is collective.

    Attributes
    ----------
    label : str
        Its short name, above its columns.
    needs_mpirun : bool
        Whether it knows its ranks only if mpirun started them.
    version : str
        Name and version.
    """

    label: ClassVar[str]
    needs_mpirun: ClassVar[bool] = False
    version: str

    @abstractmethod
    def __init__(self, comm: Communicator) -> None: ...

    @abstractmethod
    def barrier(self) -> None:
        """Waits for all ranks, and moves what is left to be moved."""

    def close(self) -> None:  # noqa: B027 - MPI ends with the process
        """Collective."""


class Mpi(Library):
    """MPI through mpi4py.

    Attributes
    ----------
    module : mpi4py.MPI
    world : mpi4py communicator
        All ranks.
    """

    label = "MPI"
    needs_mpirun = True

    def __init__(self, comm: Communicator) -> None:
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise XcclUsageError(f"bench: --vs mpi needs mpi4py ({error}): pip install 'xccl[mpi]'") from error
        self.module: Any = MPI
        self.world: Any = MPI.COMM_WORLD
        self.version = library_name(MPI)

    def barrier(self) -> None:
        """MPI moves data only inside its calls."""
        self.world.Barrier()


LIBRARIES: dict[str, type[Library]] = {"mpi": Mpi}


def library_name(mpi: Any) -> str:
    """Name and version of the MPI that mpi4py uses."""
    return str(mpi.Get_library_version()).split("\n")[0].split(",")[0].strip("\0 ")
