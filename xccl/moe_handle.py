"""What a dispatch leaves behind: for the experts, where rows come from; for combine, where they return to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from xccl.errors import XcclUsageError

if TYPE_CHECKING:
    from xccl.expert_parallel import ExpertParallel

T = TypeVar("T")


class Handle:
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

    num_recv: int
    num_recv_tokens_per_expert: NDArray[np.int32]
    _sources: NDArray[np.int32]  # [2, num_recv]

    def __init__(self, ep: ExpertParallel, c_handle: Any, num_tokens: int) -> None:
        self._ep = ep
        self._c = c_handle
        self.num_tokens = num_tokens

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


class Hook(Generic[T]):
    """The second half of a dispatch or combine: call it once to wait for the peers and get the result.

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
