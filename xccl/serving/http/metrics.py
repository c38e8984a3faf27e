"""What the server counts: for Prometheus, and for the page."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from xccl.serving.config import ModelConfig
from xccl.serving.http.generation import Finish, Timing
from xccl.serving.http.pool import RankPool, RankView

CONTENT_TYPE = CONTENT_TYPE_LATEST

_FIRST_TOKEN_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_PER_TOKEN_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_RECENT = 512  # choices over which the page's percentiles are taken


class Metrics:
    """Counts what the front does, and reads from the pool how the ranks are."""

    def __init__(self, pool: RankPool, config: ModelConfig) -> None:
        self._pool = pool
        first = config.num_dense_layers
        self._layer_names = [*(f"layer {number}" for number in range(first, config.num_layers)), "MTP"]
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series beside each, of no use here
        self._registry = CollectorRegistry()
        self._registry.register(_RankCollector(pool.ranks))
        self._requests = Counter(
            "xccl_requests",
            "HTTP requests for text by how they ended",
            ["outcome"],
            registry=self._registry,
        )
        self._texts = Counter("xccl_texts", "Texts that ended by themselves", ["reason"], registry=self._registry)
        self._tokens = Counter("xccl_tokens", "Tokens of prompts and texts", ["kind"], registry=self._registry)
        self._first_token = Histogram(
            "xccl_time_to_first_token_seconds",
            "From the request to the first token of a text",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=self._registry,
        )
        self._per_token = Histogram(
            "xccl_time_per_output_token_seconds",
            "Mean time of the tokens of a text after its first",
            buckets=_PER_TOKEN_BUCKETS,
            registry=self._registry,
        )
        self._recent: deque[Timing] = deque(maxlen=_RECENT)

    def note_request(self, outcome: str, prompt_tokens: int = 0, new_tokens: int = 0) -> None:
        """A request is over: answered, refused, hung_up or failed."""
        self._requests.labels(outcome).inc()
        self._tokens.labels("prompt").inc(prompt_tokens)
        self._tokens.labels("generated").inc(new_tokens)

    def note_text(self, finish: Finish, timing: Timing) -> None:
        """A text has ended by itself."""
        self._texts.labels(finish).inc()
        self._first_token.observe(timing.first_token)
        if timing.per_token is not None:
            self._per_token.observe(timing.per_token)
        self._recent.append(timing)

    def exposition(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self._registry)

    def picture(self) -> dict[str, Any]:
        """The state of the server for the page: ranks, bytes between them, load of the experts, times in ms."""
        load = _expert_load(self._pool.ranks)
        per_token = [timing.per_token for timing in self._recent if timing.per_token is not None]
        return {
            "ranks": [_describe(rank) for rank in self._pool.ranks],
            "bytes": _bytes_between(self._pool.ranks),
            "expert_load": dict(zip(self._layer_names, load, strict=False)),  # no MTP layer with --no-mtp
            "unfinished": self._pool.num_unfinished,
            "slots": self._pool.num_slots,
            "queue": self._pool.queue,
            "generated": self._pool.num_generated,
            "ttft_ms": _percentiles([timing.first_token for timing in self._recent]),
            "tpot_ms": _percentiles(per_token),
        }


class _RankCollector(Collector):
    """Series that are read from the ranks' last reports when somebody asks."""

    def __init__(self, ranks: Sequence[RankView]) -> None:
        self._ranks = ranks

    def collect(self) -> Iterable[Metric]:
        """One sample a rank for each series."""
        gauges = {
            "waiting": GaugeMetricFamily("xccl_requests_waiting", "Requests that wait for a slot", labels=["rank"]),
            "running": GaugeMetricFamily("xccl_requests_running", "Requests in slots", labels=["rank"]),
            "kv_blocks": GaugeMetricFamily("xccl_kv_blocks_used", "KV blocks that requests hold", labels=["rank"]),
        }
        steps = CounterMetricFamily("xccl_steps", "Steps of the engine", labels=["rank"])
        moved = CounterMetricFamily("xccl_expert_bytes", "Bytes to and from experts", labels=["source", "destination"])
        for number, rank in enumerate(self._ranks):
            if rank.status is None:
                continue
            for name, gauge in gauges.items():
                gauge.add_metric([str(number)], getattr(rank.status, name))
            steps.add_metric([str(number)], rank.status.steps)
        for source, row in enumerate(_bytes_between(self._ranks)):
            for destination, count in enumerate(row):
                moved.add_metric([str(source), str(destination)], count)
        return [*gauges.values(), steps, moved]


def _describe(view: RankView) -> dict[str, Any]:
    info, status = view.info, view.status
    if info is None:
        return {"roles": []}
    return {
        "rank": info.rank,
        "pid": info.pid,
        "roles": info.roles,
        "experts": info.local_experts,
        "slots": info.slots,
        "running": status.running if status else 0,
        "waiting": status.waiting if status else 0,
        "kv_blocks": info.kv_blocks,
        "kv_blocks_used": status.kv_blocks if status else 0,
        "steps": status.steps if status else 0,
        "drafted": status.drafted if status else 0,
        "accepted": status.accepted if status else 0,
    }


def _bytes_between(ranks: Sequence[RankView]) -> list[list[int]]:
    """[source][destination]: token rows on their way to experts, and outputs on their way back."""
    moved = np.zeros((len(ranks), len(ranks)), np.int64)
    for number, rank in enumerate(ranks):
        if rank.status is not None:
            moved[number] += rank.status.bytes_to
            moved[:, number] += rank.status.bytes_from
    counts: list[list[int]] = moved.tolist()
    return counts


def _expert_load(ranks: Sequence[RankView]) -> list[list[int]]:
    """[layer][expert]: tokens of all ranks."""
    known = [np.array(rank.status.expert_load, np.int64) for rank in ranks if rank.status is not None]
    total: list[list[int]] = sum(known[1:], known[0]).tolist() if known else []
    return total


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """Median and 99th percentile in ms; None without data."""
    if not seconds:
        return None
    p50, p99 = np.percentile(seconds, [50, 99])
    return {"p50": round(1e3 * float(p50), 3), "p99": round(1e3 * float(p99), 3)}
