"""What a MoE layer needs from the layer below: dispatch and combine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from xccl.serving.arrays import AnyArray, FloatArray, IntArray


class DispatchHandle(Protocol):
    """What dispatch returns beside the rows."""

    @property
    def num_recv_tokens_per_expert(self) -> AnyArray:
        """Rows of each local expert, int32 [local experts]."""


class ExpertTransport(Protocol):
    """The part of ``xccl.ExpertParallel`` that a MoE layer uses."""

    def dispatch_async(
        self, x: AnyArray, topk_idx: IntArray, topk_weights: FloatArray
    ) -> Callable[[], tuple[AnyArray, DispatchHandle]]:
        """Send tokens to the ranks of their experts. The hook returns this rank's rows, sorted by local expert.

        Collective.
        """

    def combine(self, y: AnyArray, handle: Any) -> AnyArray:
        """Weighted sum of the expert outputs at the rank of each token; ``handle`` is the dispatch's. Collective."""
