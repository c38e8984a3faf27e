"""Serves a fixed list of requests, which all arrive at the beginning."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from xccl.serving.engine import Engine, StepNews
from xccl.serving.exchange import StepExchange, StepReport
from xccl.serving.request import Request, RequestOutput
from xccl.serving.statistics import MeasuredTransport, RankResult


def serve_offline(
    engine: Engine,
    transport: MeasuredTransport,
    exchange: StepExchange,
    requests: Sequence[Request],
    on_report: Callable[[StepReport], None] | None = None,
) -> RankResult:
    """Serve this rank's ``requests`` to their ends. Collective: returns when all ranks are done.

    ``transport`` is that of the engine's model. ``on_report`` is called with the report of every step (all ranks'
    new tokens).
    """
    engine.add(requests)
    outputs = {request.request_id: RequestOutput(request.request_id) for request in requests}
    start = time.perf_counter()
    steps = 0
    unfinished = True
    with np.errstate(over="ignore"):
        while unfinished:
            news = engine.step()
            steps += 1
            _take(outputs, news, time.perf_counter() - start)
            report = exchange(engine.num_unfinished, news.request_ids, news.tokens)
            if on_report is not None:
                on_report(report)
            unfinished = report.num_unfinished > 0
    return RankResult(
        outputs=list(outputs.values()),
        elapsed=time.perf_counter() - start,
        steps=steps,
        drafted=engine.drafted,
        accepted=engine.accepted,
        row_stable=engine.row_stable,
        dispatch_us=transport.dispatch_us,
        combine_us=transport.combine_us,
        recv_rows=transport.recv_rows,
        expert_load=transport.expert_load,
    )


def _take(outputs: dict[int, RequestOutput], news: StepNews, now: float) -> None:
    """Add a step's tokens to the outputs; ``now`` is when they came."""
    for request_id, token in zip(news.request_ids, news.tokens.tolist(), strict=True):
        output = outputs[request_id]
        output.tokens.append(token)
        output.last_token = now
        output.first_token = output.first_token or now
    for request_id, reason in news.ended:
        outputs[request_id].finish_reason = reason
