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
    slots = slots_of_rank(options.batch, 0, comm.size)
    transport = xccl.ExpertParallel(
        comm,
        config.num_experts,
        config.hidden,
        config.num_topk,
        max_step_rows(slots, PREFILL_ROWS),
        dtype="float32",
        quant=options.quant,
    )
    with threadpool_limits(BLAS_THREADS):
        engine = _engine(
            config,
            # without dequantize=False, the rows are one array
            cast(ExpertTransport, transport),
            options,
            slots_of_rank(options.batch, comm.rank, comm.size),
            transport.local_experts,
            on_report,
            StepExchange(comm, 2 * slots),
        )
        comm.barrier()
        return engine.run(requests_of_rank(requests, options.batch, comm.rank, comm.size))


def serve_reference(
    requests: Sequence[Request], options: ServiceOptions, on_report: OnReport | None = None
) -> RankResult:
    """Serve all requests in this process, without any communication: what every other run must equal."""
    config = ModelConfig.load(options.model / "config.json")
    transport = LocalExperts(config.num_experts, options.quant)
    with threadpool_limits(BLAS_THREADS):
        engine = _engine(config, transport, options, options.batch, np.arange(config.num_experts), on_report)
        return engine.run(requests)


def _engine(
    config: ModelConfig,
    transport: ExpertTransport,
    options: ServiceOptions,
    slots: int,
    local_experts: IntArray,
    on_report: OnReport | None,
    exchange: StepExchange | None = None,
) -> Engine:
    moe_calls = config.num_moe_layers + options.mtp
    measured = MeasuredTransport(transport, config.num_experts, moe_calls)
    model = MoEModel.load(options.model, measured, local_experts)
    engine_options = EngineOptions(slots, options.mtp, options.kv_blocks)
    return Engine(model, measured, exchange or StepExchange(None, 2 * slots), engine_options, on_report)
