"""A2E and E2A as one writes them today with NumPy and MPI: Alltoallv on an intercommunicator.

The same as `moe_twin`, with the same care, except that ranks with tokens and ranks with experts are the two groups of
the intercommunicator: each does its half of the work only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xccl.bench.moe_twin import Array, Twin
from xccl.reference import default_expert_map


class MaTwin(Twin):
    """The contract of xccl.AttentionExpert for one domain, with the default expert map.

    `attention`: how many of the first ranks of `world` have tokens; the others have the experts. Collective.
    """

    def __init__(
        self,
        world: Any,
        mpi: Any,
        attention: int,
        num_experts: int,
        hidden: int,
        num_topk: int,
        dtype: Any,
        *,
        quantise: bool = True,
    ) -> None:
        has_experts = world.Get_rank() >= attention
        local = world.Split(int(has_experts))
        inter = local.Create_intercomm(0, world, 0 if has_experts else attention)
        super().__init__(inter, mpi, num_experts, hidden, num_topk, dtype, quantise=quantise)
        self.local = local
        self.size = inter.Get_remote_size()  # the peers
        self.owner = default_expert_map(num_experts, world.Get_size() - attention)
        self.first_expert, self.end_expert = np.searchsorted(self.owner, [self.rank, self.rank + 1])
        self._no_x = np.empty((0, hidden), self.dtype)
        self._no_experts = np.empty((0, num_topk), np.int64)
        self._nobody = np.zeros(self.size, np.int64)

    def a2e(self, x: Array, topk_idx: Array) -> None:
        """Sends the tokens of an attention rank."""
        owner = self.owner[topk_idx]
        self._send_tokens(x, topk_idx, owner)
        self.home_counts, self.home = self._homes(owner)

    def a2e_recv(self) -> Array:
        """The rows of an expert rank, sorted by (local expert, source rank, token); valid until the next call."""
        rows, experts, recv_counts = self._send_tokens(self._no_x, self._no_experts, self._no_experts)
        recv_x, self.arrival, self.back_counts = self._sorted(rows, experts, recv_counts)
        return recv_x

    def e2a_send(self, y: Array) -> None:
        """Sends the outputs of an expert rank."""
        back = self._gathered("back", y.view(self.bits), self.arrival)
        self._exchange("home", back, self.back_counts, self._nobody)

    def e2a(self, topk_weights: Array, out: Array) -> None:
        """Weighted sum in float32 of each token's expert outputs, at an attention rank."""
        nothing = self._no_x.view(self.bits)
        rows = self._exchange("home", nothing, self._nobody, self.home_counts)
        self._sum(rows, self.home, topk_weights, out)

    def close(self) -> None:
        """Frees the communicators. Collective."""
        self.comm.Free()
        self.local.Free()
