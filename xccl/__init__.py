"""xccl: a shared-memory address space with put/get/signal, send/receive, collectives and MoE dispatch/combine.

    import xccl

    comm = xccl.init()                      # under `xccl run -n 4 prog.py`, mpirun, torchrun, or alone
    total = comm.all_reduce(x)

See https://arxiv.org/abs/2508.02520 for the library that this one is modelled on.
"""

from xccl import faults, reference
from xccl.attention_expert import AttentionExpert
from xccl.communicator import Communicator, init
from xccl.errors import (
    Missing,
    XcclAborted,
    XcclError,
    XcclInjected,
    XcclMissingExperts,
    XcclOutOfMemory,
    XcclPeerLost,
    XcclRaceError,
    XcclSystemError,
    XcclTimeout,
    XcclUsageError,
)
from xccl.expert_parallel import ExpertParallel
from xccl.launcher import run
from xccl.moe_config import BufferBytes
from xccl.moe_handle import A2EHandle, Handle, Hook
from xccl.options import rc
from xccl.point_to_point import ANY_SOURCE, ANY_TAG
from xccl.prepared import Prepared
from xccl.request import Message, Request
from xccl.signals import Signal

__version__ = "0.1.0"

__all__ = [
    "ANY_SOURCE",
    "ANY_TAG",
    "A2EHandle",
    "AttentionExpert",
    "BufferBytes",
    "Communicator",
    "ExpertParallel",
    "Handle",
    "Hook",
    "Message",
    "Missing",
    "Prepared",
    "Request",
    "Signal",
    "XcclAborted",
    "XcclError",
    "XcclInjected",
    "XcclMissingExperts",
    "XcclOutOfMemory",
    "XcclPeerLost",
    "XcclRaceError",
    "XcclSystemError",
    "XcclTimeout",
    "XcclUsageError",
    "faults",
    "init",
    "rc",
    "reference",
    "run",
]
