"""One rank raises: MPI's abort must end the job, with its traceback, though the others wait."""

from __future__ import annotations

import xccl

comm = xccl.init()
if comm.rank == 1:
    raise RuntimeError("rank one is unhappy")
comm.barrier(timeout=600)
