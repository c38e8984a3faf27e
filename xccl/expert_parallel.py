"""Expert parallelism: tokens to the ranks of their experts (dispatch) and the outputs back (combine)."""

from __future__ import annotations

import time
import weakref
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from xccl._binding import array_address, check, ffi, lib, timeout_ns, writable
from xccl.communicator import Communicator
from xccl.errors import XcclMissingExperts, XcclUsageError
from xccl.moe_alive import LiveExperts
from xccl.moe_config import BufferBytes, OnMissing, Quant, make_config, on_missing_code, row_dtype
from xccl.moe_group import INT8, start_of, time_left
from xccl.moe_handle import Handle, Hook
from xccl.row_pool import RowPool

Array = np.ndarray[Any, Any]
Rows = tuple[Array, Handle]
RawRows = tuple[tuple[NDArray[np.int8], NDArray[np.float32]], Handle]  # with dequantize=False

_INT64 = np.dtype(np.int64)

_INT32S = ffi.typeof("int32_t[]")


class ExpertParallel(LiveExperts):
    """The experts of an MoE layer, spread over the ranks of a communicator (the paper's dispatch and combine, Fig. 7).

    Every operation is collective: a rank without tokens takes part with zero. Results depend on the routing only, not
    on timing: they are equal, bit for bit, to those of `xccl.reference`. One instance serves any number of layers of
    the same shape. Arrays are never copied silently: dtype and layout must be as described, or XcclUsageError says
    what differs.

    Making one is collective. It raises XcclUsageError if an argument differs between ranks (naming it and the rank),
    XcclOutOfMemory if the address space does not suffice.

    Parameters
    ----------
    comm : Communicator
    num_experts : int
        Experts of all ranks together; any number.
    hidden : int
        Elements of a row.
    num_topk : int
        Expert slots of a token.
    num_max_tokens_per_rank : int
        The most tokens that a rank dispatches at once.
    dtype : float32, float16 or bfloat16
    quant : None or "int8"
        How dispatch carries rows: as they are, or as int8 with one float32 scale a row (max|x| / 127). Combine always
        carries dtype.
    expert_map : int [num_experts], optional
        The rank of each expert, -1: none has it, it gets no tokens. Default: contiguous blocks, sizes differ by at most
        one, larger blocks first.
    on_missing : "raise", "renormalize" or "zero"
        What combine does about tokens that chose experts without a live rank; see there. May differ between ranks.
    timeout : float, optional
        Seconds, as in every blocking call; the default is that of xccl.init.

    Attributes
    ----------
    comm, num_experts, hidden, num_topk, num_max_tokens_per_rank, dtype, quant, on_missing
        As given.
    expert_map : int32 [num_experts]
    local_experts : int64 [num_local_experts]
        Ids of this rank's experts, ascending; "local expert i" is local_experts[i].
    num_local_experts : int
    """

    def __init__(
        self,
        comm: Communicator,
        num_experts: int,
        hidden: int,
        num_topk: int,
        num_max_tokens_per_rank: int,
        dtype: DTypeLike = "bfloat16",
        quant: Quant = None,
        expert_map: ArrayLike | None = None,
        *,
        on_missing: OnMissing = "raise",
        timeout: float | None = None,
    ) -> None:
        config, owner = make_config(
            comm.size, num_experts, hidden, num_topk, num_max_tokens_per_rank, dtype, quant, expert_map, on_missing
        )
        self.comm = comm
        self.num_experts, self.hidden, self.num_topk = num_experts, hidden, num_topk
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.dtype = row_dtype(dtype)
        self.quant = quant
        self.on_missing = on_missing
        self.expert_map = owner
        self.local_experts = np.flatnonzero(owner == comm.rank)
        self.num_local_experts = len(self.local_experts)
        out = ffi.new("xccl_moe_t **")
        address = ffi.cast("int32_t *", array_address(owner))
        check(lib.xccl_moe_open(comm._handle(), config, address, timeout_ns(timeout), out))
        self._c = out[0]
        self._discard = weakref.finalize(self, lib.xccl_moe_discard, self._c)
        self._num_recv, self._new_handle = ffi.new("int64_t *"), ffi.new("xccl_moe_handle_t **")
        offset, nbytes = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        lib.xccl_moe_pool(self._c, offset, nbytes)
        self._pool = RowPool(comm._world, int(offset[0]), int(nbytes[0]))
        self._in_flight: dict[Handle, Array | None] = {}  # with the y that peers may be reading
        self._world_ranks = np.array([lib.xccl_comm_world_rank(comm._handle(), pe) for pe in range(comm.size)])
        self._alive = np.ones(comm.size, np.bool_)
        self._alive.flags.writeable = False
        self._failure = ""

    @staticmethod
    def buffer_bytes(
        num_ranks: int,
        num_experts: int,
        hidden: int,
        num_topk: int,
        num_max_tokens_per_rank: int,
        dtype: DTypeLike = "bfloat16",
        quant: Quant = None,
        expert_map: ArrayLike | None = None,
    ) -> BufferBytes:
        """What the constructor will take on each rank, computed by the same code. Not collective.

        Raises XcclUsageError for arguments that the constructor would refuse.
        """
        config, owner = make_config(
            num_ranks, num_experts, hidden, num_topk, num_max_tokens_per_rank, dtype, quant, expert_map
        )
        out = ffi.new("xccl_moe_bytes_t *")
        check(lib.xccl_moe_bytes(config, num_ranks, ffi.cast("int32_t *", array_address(owner)), out))
        return BufferBytes(int(out.metadata), int(out.staging), int(out.pool))

    # ---- dispatch ----

    @overload
    def dispatch(
        self,
        x: Array,
        topk_idx: NDArray[np.int64],
        topk_weights: NDArray[np.float32] | None = ...,
        *,
        out: Array | None = ...,
        dequantize: Literal[True] = ...,
        timeout: float | None = ...,
    ) -> Rows: ...

    @overload
    def dispatch(
        self,
        x: Array,
        topk_idx: NDArray[np.int64],
        topk_weights: NDArray[np.float32] | None = ...,
        *,
        out: Array | None = ...,
        dequantize: Literal[False],
        timeout: float | None = ...,
    ) -> RawRows: ...

    def dispatch(
        self,
        x: Array,
        topk_idx: NDArray[np.int64],
        topk_weights: NDArray[np.float32] | None = None,
        *,
        out: Array | None = None,
        dequantize: bool = True,
        timeout: float | None = None,
    ) -> Rows | RawRows:
        """Sends each token to the ranks of its experts, and receives the tokens of this rank's experts. Collective.

        Arguments may be reused on return. Raises XcclUsageError naming argument, index, got and expected;
        XcclTimeout naming the ranks whose tokens are missing.

        Parameters
        ----------
        x : dtype [num_tokens, hidden]
        topk_idx : int64 [num_tokens, num_topk]
            Experts of each token, -1 for none. A token that names an expert twice arrives there twice. Experts without
            a live rank (`live_experts`) get nothing; the handle tells what is missing.
        topk_weights : float32 [num_tokens, num_topk], optional
            Kept for combine.
        out : dtype [at least num_recv, hidden], optional
            Where to put the rows; its first num_recv rows are returned. int8 with dequantize=False.
        dequantize : bool
            With quant="int8": False gives the int8 rows and their scales instead of rows in dtype.

        Returns
        -------
        recv_x : dtype [num_recv, hidden]
            Sorted by (local expert, source rank, token): ready for a grouped matrix product. It is the caller's until
            garbage-collected. With dequantize=False a pair (int8 rows, float32 scales [num_recv]).
        handle : Handle
            Rows of each local expert, where they come from; combine takes it.
        """
        started = time.monotonic()
        handle = self._send(x, topk_idx, topk_weights, out, dequantize, timeout)
        try:
            return self._receive(handle, out, dequantize, time_left(timeout, started))
        except BaseException as error:
            self._fail("dispatch", error)
            raise

    @overload
    def dispatch_async(
        self,
        x: Array,
        topk_idx: NDArray[np.int64],
        topk_weights: NDArray[np.float32] | None = ...,
        *,
        out: Array | None = ...,
        dequantize: Literal[True] = ...,
        timeout: float | None = ...,
    ) -> Hook[Rows]: ...

    @overload
    def dispatch_async(
        self,
        x: Array,
        topk_idx: NDArray[np.int64],
        topk_weights: NDArray[np.float32] | None = ...,
        *,
        out: Array | None = ...,
        dequantize: Literal[False],
        timeout: float | None = ...,
    ) -> Hook[RawRows]: ...

    def dispatch_async(
        self,
        x: Array,
        topk_idx: NDArray[np.int64],
        topk_weights: NDArray[np.float32] | None = None,
        *,
        out: Array | None = None,
        dequantize: bool = True,
        timeout: float | None = None,
    ) -> Hook[Any]:
        """As dispatch, but returns once this rank's tokens are sent; `hook()` waits and returns (recv_x, handle).

        Two dispatches may be in flight; a third raises XcclUsageError. x, topk_idx and topk_weights may be
        reused on return. Collective.
        """
        handle = self._send(x, topk_idx, topk_weights, out, dequantize, timeout)
        return Hook("dispatch", lambda timeout: self._receive(handle, out, dequantize, timeout))

    def _send(
        self,
        x: Array,
        topk_idx: NDArray[np.int64],
        topk_weights: NDArray[np.float32] | None,
        out: Array | None,
        dequantize: bool,
        timeout: float | None,
    ) -> Handle:
        """Checks everything that can be checked without the peers, and sends."""
        group = self._group("dispatch")
        if not dequantize and self.quant is None:
            raise self._error("dispatch", "dequantize=False needs quant='int8'")
        rows = self._rows("dispatch", "x", x)
        num_tokens = x.shape[0]
        slots = self._slots("dispatch", "topk_idx", topk_idx, num_tokens, _INT64)
        weights = self._weights("dispatch", topk_weights, num_tokens)
        if out is not None:
            self._rows("dispatch", "out", out, self.dtype if dequantize else INT8, write=True)
        new = self._new_handle
        check(lib.xccl_moe_dispatch_send(group, rows, num_tokens, slots, weights, timeout_ns(timeout), new))
        result = Handle(self, ffi.gc(new[0], lib.xccl_moe_handle_free), num_tokens)
        self._in_flight[result] = None
        return result

    def _receive(self, handle: Handle, out: Array | None, dequantize: bool, timeout: float | None) -> Rows | RawRows:
        group = self._group("dispatch")
        counts = np.empty(self.num_local_experts, np.int32)
        check(
            lib.xccl_moe_dispatch_wait(
                group, handle._c, timeout_ns(timeout), self._num_recv, ffi.from_buffer(_INT32S, counts)
            )
        )
        n = self._num_recv[0]
        try:
            room = self._room("dispatch", n, out, dequantize, self._pool)
        except XcclUsageError as error:
            self._fail("dispatch", error)
            raise
        check(lib.xccl_moe_dispatch_pull(group, handle._c, *room.pointers("dispatch")))
        handle.num_recv, handle.num_recv_tokens_per_expert, handle._sources = n, counts, room.sources
        del self._in_flight[handle]
        return room.rows(), handle

    # ---- combine ----

    def combine(
        self,
        y: Array,
        handle: Handle,
        topk_weights: NDArray[np.float32] | None = None,
        *,
        out: Array | None = None,
        on_missing: OnMissing | None = None,
        timeout: float | None = None,
    ) -> Array:
        """Weighted sum of each token's expert outputs, on the rank that dispatched the token. Collective.

        The sum runs in float32 over the slots of topk_idx in ascending order and is rounded once. Weights are
        those given here, else those given to dispatch, else the sum is a plain one. A token without experts
        gives zeros. Returns [num_tokens, hidden]; y may be changed on return.

        Parameters
        ----------
        y : dtype [num_recv, hidden]
            Output for each row of recv_x, in its order. Rows must be contiguous, their distance may be larger. A y
            in this rank's symmetric memory (recv_x itself, `empty`, views of comm.zeros arrays) is read there by
            the peers, any other is copied once.
        handle : Handle
            Of the dispatch; each handle can be combined once, and in the same order on all ranks.
        topk_weights : float32 [num_tokens, num_topk], optional
        out : dtype [num_tokens, hidden], optional
            Where to put the result; must not overlap y.
        on_missing : "raise", "renormalize" or "zero", optional
            What to do about tokens of this rank with experts that had no live rank when dispatched; default: that of
            the constructor. "raise": XcclMissingExperts, when this rank's part is done, so no peer waits for it and
            the next call works. "zero": sum over the live experts. "renormalize": the same with each weight w
            replaced by w / kept * total, in float32, where kept is the sum of the weights of the live experts and
            total that of all the token's experts (without weights: their numbers), over the slots in ascending order;
            weights stay as they are if one of them is negative or NaN, or a sum is 0 or infinite. A token without
            any live expert gives zeros, never NaN, and is listed in `handle.tokens_without_expert`.
        """
        started = time.monotonic()
        self._publish(y, handle, topk_weights, out, on_missing, timeout)
        try:
            return self._sum(handle, out, time_left(timeout, started))
        except XcclMissingExperts:
            raise
        except BaseException as error:
            self._fail("combine", error)
            raise

    def combine_async(
        self,
        y: Array,
        handle: Handle,
        topk_weights: NDArray[np.float32] | None = None,
        *,
        out: Array | None = None,
        on_missing: OnMissing | None = None,
        timeout: float | None = None,
    ) -> Hook[Array]:
        """As combine, but returns once this rank's outputs are published; `hook()` waits and returns the sums.

        A y in symmetric memory must not change before the hook has returned. Two combines may be in flight; a
        third raises XcclUsageError. Collective.
        """
        self._publish(y, handle, topk_weights, out, on_missing, timeout)
        return Hook("combine", lambda timeout: self._sum(handle, out, timeout))

    def _publish(
        self,
        y: Array,
        handle: Handle,
        topk_weights: NDArray[np.float32] | None,
        out: Array | None,
        on_missing: OnMissing | None,
        timeout: float | None,
    ) -> None:
        group = self._group("combine")
        if not isinstance(handle, Handle) or handle._ep is not self:
            raise self._error("combine", f"the handle is not one of this ExpertParallel's dispatches: {handle!r}")
        if hasattr(handle, "num_recv"):  # otherwise the C core says that the dispatch has not completed
            self._outputs("combine", y, handle.num_recv)
        weights = self._weights("combine", topk_weights, handle.num_tokens)
        if out is not None:
            self._rows("combine", "out", out, write=True)
            if out.shape[0] != handle.num_tokens:
                raise self._error("combine", f"out has {out.shape[0]} rows, expected {handle.num_tokens}")
            if np.may_share_memory(out, y):
                raise self._error("combine", "out overlaps y, which the peers read")
        where = f"combine on rank {self.comm.rank}"
        policy = None if on_missing is None else on_missing_code(on_missing, where)
        check(lib.xccl_moe_combine_send(group, handle._c, *start_of(y), weights, timeout_ns(timeout)))
        self._in_flight[handle] = y
        if policy is not None:
            lib.xccl_moe_on_missing(handle._c, policy)

    def _sum(self, handle: Handle, out: Array | None, timeout: float | None) -> Array:
        group = self._group("combine")
        result = np.empty((handle.num_tokens, self.hidden), self.dtype) if out is None else out
        try:
            check(lib.xccl_moe_combine_wait(group, handle._c, writable(result, "out", "combine"), timeout_ns(timeout)))
        except XcclMissingExperts as error:
            del self._in_flight[handle]
            raise XcclMissingExperts(str(error), handle._tokens_missing_some) from None
        del self._in_flight[handle]
        return result

    # ---- memory and end ----

    def empty(self, num_rows: int) -> Array:
        """An array of dtype [num_rows, hidden] with undefined content, for y: combine reads it without a copy.

        It comes from the pool that dispatch uses too, and is an ordinary array when that is used up. Not collective.
        """
        self._group("empty")
        return self._pool.empty((num_rows, self.hidden), self.dtype)

    def close(self, *, timeout: float | None = None) -> None:
        """Gives the memory back; raises XcclUsageError while a hook is outstanding. Twice is no error. Collective.

        Arrays that dispatch and `empty` returned stay valid; if there are any, the pool's memory is kept until
        the world ends.
        """
        if self._c is None:
            return
        self.comm._handle()
        check(lib.xccl_moe_close(self._c, self._pool.live > 0, timeout_ns(timeout)))
        self._discard.detach()
        self._c = None

    def __enter__(self) -> ExpertParallel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an exception the others may be in the middle of an operation: do not wait for them.
        if kind is None:
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._c is None else f"{self.num_local_experts} here"
        return (
            f"<xccl.ExpertParallel {self.num_experts} experts on {self.comm.size} ranks ({state}), "
            f"hidden {self.hidden}, top-{self.num_topk}, {self.dtype}, quant {self.quant}>"
        )
