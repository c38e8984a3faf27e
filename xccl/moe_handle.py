"""What a dispatch or A2E leaves behind: where rows come from, and so where their outputs return to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from xccl.errors import XcclUsageError

if TYPE_CHECKING:
    from xccl.attention_expert import AttentionExpert
    from xccl.expert_parallel import ExpertParallel

T = TypeVar("T")


class ReceivedRows:
    """What a rank knows of the rows that it received.

    Attributes
    ----------
    num_recv : int
        Rows that this rank received.
    num_recv_tokens_per_expert : int32 [num_local_experts]
        Rows of each local expert; they follow each other in recv_x.
    src_rank, src_token : int32 [num_recv]
        Rank that sent each row, and the row's index in its x.
    """

    num_recv: int
    num_recv_tokens_per_expert: NDArray[np.int32]
    _sources: NDArray[np.int32]  # [2, num_recv]

    @property
    def src_rank(self) -> NDArray[np.int32]:
        """Rank that sent each row."""
        return np.asarray(self._sources[0])

    @property
    def src_token(self) -> NDArray[np.int32]:
        """Index of each row in the x of its source."""
        return np.asarray(self._sources[1])

    def __reduce__(self) -> Any:
        raise XcclUsageError("a handle belongs to its process and cannot be pickled")


class Handle(ReceivedRows):
    """One dispatch of one rank. `ExpertParallel.combine` takes it, once.

    Attributes
    ----------
    num_tokens : int
        Tokens that this rank dispatched: rows of combine's result.
    num_recv : int
        Rows that this rank received.
    num_recv_tokens_per_expert : int32 [num_local_experts]
        Rows of each local expert; they follow each other in recv_x.
    src_rank, src_token : int32 [num_recv]
        Rank that sent each row, and the row's index in its x.
    """

    def __init__(self, ep: ExpertParallel, c_handle: Any, num_tokens: int) -> None:
        self._ep = ep
        self._c = c_handle
        self.num_tokens = num_tokens


class A2EHandle(ReceivedRows):
    """One micro-batch at an expert rank. `AttentionExpert.e2a_send` takes it, once.

    Attributes
    ----------
    domain : int
        The domain whose attention ranks sent it.
    num_recv : int
        Rows that this rank received.
    num_recv_tokens_per_expert : int32 [num_local_experts]
        Rows of each local expert; they follow each other in recv_x.
    src_rank, src_token : int32 [num_recv]
        Attention rank that sent each row, and the row's index in its x.
    """

    def __init__(self, ae: AttentionExpert, domain: int, batch: int) -> None:
        self._ae = ae
        self._batch = batch  # the C core's number of it
        self._y: Any = None  # what the peers may be reading
        self.domain = domain


class Hook(Generic[T]):
    """The second half of an operation: call it once to wait for the peers and get the result.

    After XcclTimeout it may be called again; nothing is lost.
    """

    def __init__(self, operation: str, complete: Callable[[float | None], T]) -> None:
        self._operation = operation
        self._complete: Callable[[float | None], T] | None = complete

    def __call__(self, *, timeout: float | None = None) -> T:
        """Completes the operation; returns what the call without `_async` returns. Collective."""
        if self._complete is None:
            raise XcclUsageError(f"{self._operation}: this hook has been called already")
        result = self._complete(timeout)
        self._complete = None  # lets go of the arrays
        return result
