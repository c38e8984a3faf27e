"""The libraries that --vs compares with."""

from __future__ import annotations

import importlib
import importlib.util
import os
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import Any, ClassVar

import numpy as np

from xccl.communicator import Communicator
from xccl.errors import XcclUsageError

_GLOO_SECONDS = 60  # nobody waits for ever


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

    @classmethod  # noqa: B027 - mpirun comes with its MPI
    def require(cls) -> None:
        """Raises XcclUsageError if it is not installed: before ranks are started, not in each of them."""

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
            raise XcclUsageError(f"bench: --vs needs mpi4py ({error}): pip install 'xccl[mpi]'") from error
        self.module: Any = MPI
        self.world: Any = MPI.COMM_WORLD
        self.version = library_name(MPI)

    def barrier(self) -> None:
        """MPI moves data only inside its calls."""
        self.world.Barrier()


class Gloo(Library):
    """gloo through torch.distributed. It moves everything over TCP, here through the loopback device.

    Attributes
    ----------
    distributed : torch.distributed
    """

    label = "gloo"

    @classmethod
    def require(cls) -> None:
        """Raises XcclUsageError without PyTorch."""
        if importlib.util.find_spec("torch") is None:
            raise XcclUsageError("bench: --vs gloo needs PyTorch: pip install 'xccl[torch]'")

    def __init__(self, comm: Communicator) -> None:
        # Its default is the device of the host's name, which need not be one that reaches this host.
        device = os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self.torch: Any = importlib.import_module("torch")  # seconds, so only where it is wanted
        self.distributed: Any = importlib.import_module("torch.distributed")
        distributed = self.distributed
        self.version = f"gloo of torch {self.torch.__version__} over TCP, device {device}"
        limit = timedelta(seconds=_GLOO_SECONDS)
        address = "127.0.0.1"
        if comm.rank == 0:
            store = distributed.TCPStore(address, 0, comm.size, is_master=True, timeout=limit, wait_for_workers=False)
        port = int(comm.broadcast(np.array([store.port if comm.rank == 0 else 0]), 0)[0])
        if comm.rank != 0:
            store = distributed.TCPStore(address, port, comm.size, is_master=False, timeout=limit)
        distributed.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size, timeout=limit)

    def tensor(self, a: np.ndarray[Any, Any]) -> Any:
        """A tensor on the memory of an array."""
        return self.torch.from_numpy(a)

    def function(self, *names: str) -> Any:
        """The first of these functions of torch.distributed that is there: some were renamed."""
        return next(getattr(self.distributed, name) for name in names if hasattr(self.distributed, name))

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.distributed.barrier()

    def close(self) -> None:
        """Closes the connections. Collective."""
        self.distributed.barrier()  # rank 0 has the store
        self.distributed.destroy_process_group()


# mpi-packed: MPI does less than the operation, see the operations that have it
LIBRARIES: dict[str, type[Library]] = {"mpi": Mpi, "mpi-packed": Mpi, "gloo": Gloo}


def library_name(mpi: Any) -> str:
    """Name and version of the MPI that mpi4py uses."""
    return str(mpi.Get_library_version()).split("\n")[0].split(",")[0].strip("\0 ")
