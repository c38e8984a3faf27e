"""What a dispatch or A2E leaves behind: where rows come from, and so where their outputs return to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from xccl._binding import ffi, lib
from xccl.errors import XcclMissingExperts, XcclUsageError

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
    missing_weight : float32 [num_tokens]
        Of each token dispatched, the weight of its experts that had no live rank: 0 if it misses none.
    tokens_without_expert : int64 [number of such tokens]
        Tokens dispatched that chose experts none of which had a live rank; combine gives zeros for them.
    """

    def __init__(self, ep: ExpertParallel, c_handle: Any, num_tokens: int) -> None:
        self._ep = ep
        self._c = c_handle
        self.num_tokens = num_tokens

    @property
    def missing_weight(self) -> NDArray[np.float32]:
        """Weight of each token's experts that had no live rank when it was dispatched, float32 [num_tokens].

        The sum, in float32 over the slots of topk_idx in ascending order, of the weights given to combine, until then
        (or if it was given none) of those given to dispatch. Without any weights the number of such experts.
        """
        return self._missing()[0]

    @property
    def tokens_without_expert(self) -> NDArray[np.int64]:
        """Tokens, int64 ascending, that chose experts none of which had a live rank.

        Not those that chose none at all (-1 in all slots).
        """
        _, missing, kept = self._missing()
        return np.flatnonzero((missing > 0) & (kept == 0))

    @property
    def _tokens_missing_some(self) -> tuple[int, ...]:
        return tuple(np.flatnonzero(self._missing()[1]).tolist())

    def _missing(self) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]:
        """Of each token: weight of its missing experts, their number, number of its live ones."""
        weight = np.empty(self.num_tokens, np.float32)
        missing, kept = np.empty((2, self.num_tokens), np.int32)
        floats, ints = ffi.typeof("float[]"), ffi.typeof("int32_t[]")
        lib.xccl_moe_missing(
            self._c, ffi.from_buffer(floats, weight), ffi.from_buffer(ints, missing), ffi.from_buffer(ints, kept)
        )
        return weight, missing, kept


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
        try:
            result = self._complete(timeout)
        except XcclMissingExperts:  # complete all the same
            self._complete = None
            raise
        self._complete = None  # lets go of the arrays
        return result
