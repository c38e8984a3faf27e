"""Counts what dispatch and combine move between ranks, in constant memory: for a server that runs for ever."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from xccl.serving.arrays import AnyArray, FloatArray, IntArray
from xccl.serving.transport import DispatchHandle, ExpertTransport

_FLOAT_BYTES = 4


class MeteredTransport:
    """A transport that counts the rows of every call of another one.

    ``owner`` [experts] is the rank of each expert. A step makes ``layers`` dispatch calls in layer order, which
    ``expert_load`` [layers, experts] tells apart. ``bytes_to`` [ranks] is what this rank's tokens take to the ranks
    of their experts: a row goes once to each rank, whatever the number of its experts there, as ``quant`` says.
    ``bytes_from`` [ranks] is what comes back: a float32 row of every expert. What stays on the rank is counted, too.
    """

    def __init__(self, transport: ExpertTransport, owner: AnyArray, num_ranks: int, layers: int, quant: str | None):
        self._transport = transport
        self._owner: IntArray = np.asarray(owner, np.int64)
        self._layers = layers
        self._scaled = quant is not None
        self._calls = 0
        self._rows_to: IntArray = np.zeros(num_ranks, np.int64)
        self._hidden = 0
        self.expert_load: IntArray = np.zeros((layers, len(self._owner)), np.int64)

    def dispatch_async(
        self, x: AnyArray, topk_idx: IntArray, topk_weights: FloatArray
    ) -> Callable[[], tuple[AnyArray, DispatchHandle]]:
        """Dispatch through the inner transport."""
        hook = self._transport.dispatch_async(x, topk_idx, topk_weights)
        # counted while the tokens are on their way
        self._hidden = x.shape[1]
        self.expert_load[self._calls % self._layers] += np.bincount(topk_idx.ravel(), minlength=len(self._owner))
        self._calls += 1
        goes: AnyArray = np.zeros((len(topk_idx), len(self._rows_to)), np.bool_)
        goes[np.arange(len(topk_idx))[:, None], self._owner[topk_idx]] = True
        self._rows_to += np.add.reduce(goes, axis=0, dtype=np.int64)
        return hook

    def combine(self, y: AnyArray, handle: DispatchHandle) -> AnyArray:
        """Combine through the inner transport."""
        return self._transport.combine(y, handle)

    @property
    def bytes_to(self) -> IntArray:
        """Bytes of token rows that went to each rank, int64 [ranks]."""
        row = self._hidden + _FLOAT_BYTES if self._scaled else self._hidden * _FLOAT_BYTES
        return self._rows_to * row

    @property
    def bytes_from(self) -> IntArray:
        """Bytes of expert outputs that came from each rank, int64 [ranks]."""
        rows: IntArray = np.zeros_like(self._rows_to)
        np.add.at(rows, self._owner, self.expert_load.sum(axis=0))
        return rows * (self._hidden * _FLOAT_BYTES)
