"""What one rank measures, and the figures that all ranks' measurements give together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from xccl.serving.arrays import AnyArray, FloatArray, IntArray
from xccl.serving.request import RequestOutput
from xccl.serving.transport import DispatchHandle, ExpertTransport


class MeasuredTransport:
    """A transport that counts and times every call of another one.

    A step makes ``layers`` dispatch calls in layer order; expert loads are kept per layer because expert 3 of one
    layer has nothing to do with expert 3 of the next.
    """

    def __init__(self, transport: ExpertTransport, num_experts: int, layers: int) -> None:
        self._transport = transport
        self._num_experts = num_experts
        self._layers = layers
        self.dispatch_us: list[float] = []
        self.combine_us: list[float] = []
        self.recv_rows: list[int] = []
        self.expert_load: IntArray = np.zeros((layers, num_experts), np.int64)

    def dispatch_async(
        self, x: AnyArray, topk_idx: IntArray, topk_weights: FloatArray
    ) -> Callable[[], tuple[AnyArray, DispatchHandle]]:
        """Dispatch through the inner transport; the time is that of sending and that of receiving."""
        layer = len(self.dispatch_us) % self._layers
        self.expert_load[layer] += np.bincount(topk_idx.ravel(), minlength=self._num_experts)
        start = time.perf_counter()
        hook = self._transport.dispatch_async(x, topk_idx, topk_weights)
        sending = time.perf_counter() - start

        def receive() -> tuple[AnyArray, DispatchHandle]:
            start = time.perf_counter()
            recv_x, handle = hook()
            self.dispatch_us.append((sending + time.perf_counter() - start) * 1e6)
            self.recv_rows.append(len(recv_x))
            return recv_x, handle

        return receive

    def combine(self, y: AnyArray, handle: DispatchHandle) -> AnyArray:
        """Combine through the inner transport."""
        start = time.perf_counter()
        out = self._transport.combine(y, handle)
        self.combine_us.append((time.perf_counter() - start) * 1e6)
        return out


@dataclass
class RankResult:
    """Everything one rank brings home: its requests' outputs and its measurements.

    ``elapsed`` is seconds from the common start to this rank's last step.
    """

    outputs: list[RequestOutput]
    elapsed: float
    steps: int
    drafted: int
    accepted: int
    row_stable: bool
    dispatch_us: list[float] = field(default_factory=list)
    combine_us: list[float] = field(default_factory=list)
    recv_rows: list[int] = field(default_factory=list)
    expert_load: IntArray = field(default_factory=lambda: np.zeros((0, 0), np.int64))


@dataclass(frozen=True)
class Summary:
    """Figures of a run over all ranks. Times: seconds for ttft and elapsed, ms for tpot, us for the operations.

    ``recv_imbalance`` is the sum over calls of the fullest rank's rows over the sum of the mean; ``expert_imbalance``
    the hottest expert's load over the mean, averaged over layers. A figure without data is None.
    """

    requests: int
    ranks: int
    tokens: int
    steps: int
    elapsed: float
    tokens_per_second: float
    ttft_p50: float | None
    ttft_p99: float | None
    tpot_p50: float | None
    tpot_p99: float | None
    dispatch_p50: float | None
    dispatch_p99: float | None
    combine_p50: float | None
    combine_p99: float | None
    recv_max: float | None
    recv_mean: float | None
    recv_imbalance: float | None
    expert_imbalance: float | None
    mtp_acceptance: float | None


def summarise(results: Sequence[RankResult]) -> Summary:
    """Join the measurements of all ranks of a run."""
    outputs = [output for result in results for output in result.outputs]
    tokens = sum(len(output.tokens) for output in outputs)
    elapsed = max(result.elapsed for result in results)
    ttft = [output.time_to_first_token for output in outputs]
    tpot = [1e3 * t for output in outputs if (t := output.time_per_output_token) is not None]
    dispatch = [us for result in results for us in result.dispatch_us]
    combine = [us for result in results for us in result.combine_us]
    received = np.array([result.recv_rows for result in results])
    fullest = float(received.max(axis=0).mean()) if received.size else None
    mean = float(received.mean()) if received.size else None
    drafted = sum(result.drafted for result in results)
    return Summary(
        requests=len(outputs),
        ranks=len(results),
        tokens=tokens,
        steps=results[0].steps,
        elapsed=elapsed,
        tokens_per_second=tokens / elapsed,
        ttft_p50=_percentile(ttft, 50),
        ttft_p99=_percentile(ttft, 99),
        tpot_p50=_percentile(tpot, 50),
        tpot_p99=_percentile(tpot, 99),
        dispatch_p50=_percentile(dispatch, 50),
        dispatch_p99=_percentile(dispatch, 99),
        combine_p50=_percentile(combine, 50),
        combine_p99=_percentile(combine, 99),
        recv_max=fullest,
        recv_mean=mean,
        recv_imbalance=fullest / mean if fullest is not None and mean else None,
        expert_imbalance=_expert_imbalance(sum(result.expert_load for result in results)),
        mtp_acceptance=sum(result.accepted for result in results) / drafted if drafted else None,
    )


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None


def _expert_imbalance(load: AnyArray | int) -> float | None:
    counts = np.asarray(load)
    if counts.ndim != 2 or not counts.sum():
        return None
    counts = counts[counts.sum(axis=1) > 0]
    return float((counts.max(axis=1) / counts.mean(axis=1)).mean())
