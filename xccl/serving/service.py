"""Puts the parts together: the engine of one rank of a communicator, and the single-process reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from threadpoolctl import threadpool_limits

import xccl
from xccl.moe_config import Quant
from xccl.serving.arrays import IntArray
from xccl.serving.config import ModelConfig
from xccl.serving.engine import PREFILL_ROWS, Engine, EngineOptions
from xccl.serving.exchange import StepExchange, StepReport
from xccl.serving.local_experts import LocalExperts
from xccl.serving.model import MoEModel
from xccl.serving.offline import serve_offline
from xccl.serving.request import Request
from xccl.serving.scheduler import max_step_rows
from xccl.serving.statistics import MeasuredTransport, RankResult
from xccl.serving.transport import ExpertTransport

# the matrices are small, the ranks share the cores, and more threads may sum in another order
BLAS_THREADS = 1

OnReport = Callable[[StepReport], None]


@dataclass(frozen=True)
class ServiceOptions:
    """A run over all ranks.

    ``batch`` is the largest number of concurrent requests over all ranks, ``quant`` the format in which dispatch
    sends tokens, ``kv_blocks`` the KV cache of one rank (None: enough for its requests at full context).
    """

    model: Path
    batch: int = 64
    mtp: bool = True
    quant: Quant = "int8"
    kv_blocks: int | None = None


def slots_of_rank(batch: int, rank: int, size: int) -> int:
    """Concurrent requests of one rank: ``batch`` spread evenly, lower ranks first; zero is possible."""
    return batch // size + (rank < batch % size)


def requests_of_rank(requests: Sequence[Request], batch: int, rank: int, size: int) -> list[Request]:
    """Requests that a rank owns: dealt in turn over the ranks that have a slot."""
    owners = min(batch, size)
    return list(requests[rank::owners]) if rank < owners else []


def serve_rank(
    comm: xccl.Communicator, requests: Sequence[Request], options: ServiceOptions, on_report: OnReport | None = None
) -> RankResult:
    """Serve this rank's share of ``requests`` (the same list on every rank). Collective."""
    config = ModelConfig.load(options.model / "config.json")
    parallel = expert_parallel(comm, config, options)
    transport = _measured(config, cast(ExpertTransport, parallel), options)
    exchange = StepExchange(comm, 2 * slots_of_rank(options.batch, 0, comm.size))
    with threadpool_limits(BLAS_THREADS):
        slots = slots_of_rank(options.batch, comm.rank, comm.size)
        engine = build_engine(transport, options, slots, parallel.local_experts)
        comm.barrier()
        own = requests_of_rank(requests, options.batch, comm.rank, comm.size)
        return serve_offline(engine, transport, exchange, own, on_report)


def serve_reference(
    requests: Sequence[Request], options: ServiceOptions, on_report: OnReport | None = None
) -> RankResult:
    """Serve all requests in this process, without any communication: what every other run must equal."""
    config = ModelConfig.load(options.model / "config.json")
    transport = _measured(config, LocalExperts(config.num_experts, options.quant), options)
    with threadpool_limits(BLAS_THREADS):
        engine = build_engine(transport, options, options.batch, np.arange(config.num_experts))
        return serve_offline(engine, transport, StepExchange(None, 2 * options.batch), requests, on_report)


def expert_parallel(comm: xccl.Communicator, config: ModelConfig, options: ServiceOptions) -> xccl.ExpertParallel:
    """The dispatch and combine of a run over all ranks of ``comm``, large enough for any step. Collective."""
    return xccl.ExpertParallel(
        comm,
        config.num_experts,
        config.hidden,
        config.num_topk,
        max_step_rows(slots_of_rank(options.batch, 0, comm.size), PREFILL_ROWS),
        dtype="float32",
        quant=options.quant,
    )


def build_engine(transport: ExpertTransport, options: ServiceOptions, slots: int, local_experts: IntArray) -> Engine:
    """An engine for ``slots`` concurrent requests over a model that has loaded ``local_experts``."""
    model = MoEModel.load(options.model, transport, local_experts)
    return Engine(model, EngineOptions(slots, options.mtp, options.kv_blocks))


def _measured(config: ModelConfig, transport: ExpertTransport, options: ServiceOptions) -> MeasuredTransport:
    return MeasuredTransport(transport, config.num_experts, config.num_moe_layers + options.mtp)
