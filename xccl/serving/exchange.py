"""What the ranks tell each other at the end of every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from xccl.serving.arrays import AnyArray, IntArray


class GathersArrays(Protocol):
    """The part of a communicator that the exchange uses."""

    def all_gather(self, x: AnyArray) -> AnyArray:
        """[size, *x.shape]: x of every rank. Collective."""


@dataclass(frozen=True)
class StepReport:
    """One step of all ranks: requests that are not finished anywhere, and the new tokens in order of rank.

    A request may have two new tokens in one step.
    """

    num_unfinished: int
    request_ids: IntArray
    tokens: IntArray


class StepExchange:
    """Shares each rank's new tokens and its number of unfinished requests: one small all_gather a step.

    ``max_tokens`` bounds the new tokens of one rank in one step and must be equal on all ranks. Without a
    communicator (one process) the report is the rank's own.
    """

    def __init__(self, comm: GathersArrays | None, max_tokens: int) -> None:
        self._comm = comm
        self._max_tokens = max_tokens

    def __call__(self, num_unfinished: int, request_ids: Sequence[int], tokens: IntArray) -> StepReport:
        """Report this rank's step and learn of the others'. Collective."""
        if self._comm is None:
            return StepReport(num_unfinished, np.array(request_ids, np.int64), tokens)
        count = len(request_ids)
        message = np.zeros((1 + self._max_tokens, 2), np.int64)
        message[0] = num_unfinished, count
        message[1 : 1 + count, 0] = request_ids
        message[1 : 1 + count, 1] = tokens
        gathered = self._comm.all_gather(message)
        news = np.concatenate([rank[1 : 1 + rank[0, 1]] for rank in gathered])
        return StepReport(int(gathered[:, 0, 0].sum()), news[:, 0], news[:, 1])
