"""Attention and experts on separate ranks: tokens to the expert ranks (A2E) and the outputs back (E2A)."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from xccl._binding import check, ffi, lib, timeout_ns, writable
from xccl.attention_config import PATHS, Path, make_roles
from xccl.communicator import Communicator
from xccl.moe_config import BufferBytes, Quant, row_dtype
from xccl.moe_group import INT8, MoeGroup, start_of, time_left
from xccl.moe_handle import A2EHandle, Hook
from xccl.row_pool import RowPool

Array = np.ndarray[Any, Any]
Rows = tuple[Array, A2EHandle]
RawRows = tuple[tuple[NDArray[np.int8], NDArray[np.float32]], A2EHandle]  # with dequantize=False

_INT64 = np.dtype(np.int64)
_INT32S = ffi.typeof("int32_t[]")
_PATH_NAMES: dict[int, Path] = {number: name for name, number in PATHS.items()}


class AttentionExpert(MoeGroup):
    """An MoE layer whose attention and experts live on separate ranks (the paper's A2E and E2A, section 3.3).

    Attention ranks call `a2e`, then `e2a`; expert ranks call `a2e_recv`, run their experts, and call `e2a_send`. That
    is one micro-batch; each rank may have two in flight, so that attention of one overlaps with the experts of the
    other. All attention ranks of a domain, and all expert ranks, take part in each of its micro-batches: with zero
    tokens if need be. Results depend on the routing only: they are equal, bit for bit, to those of `xccl.reference`,
    whatever the path. Arrays are never copied silently: dtype and layout must be as described, or XcclUsageError says
    what differs.

    **Paths.** On the direct path each attention rank tells every expert rank where its tokens are, and sums their
    outputs. On the trampoline path (the paper's Fig. 8) it writes them, one copy a token, into the memory of one expert
    rank, its trampoline, and tells only that one; the trampoline tells the other expert ranks, which pull, and it sums
    what comes back. So an attention rank writes one field a micro-batch and not one an expert rank.

    **Domains.** Several groups of attention ranks may share the expert ranks and take turns: expert ranks receive from
    one domain at a time, in rotation or in the order that they choose, the same on all of them. The tokens of the next
    domain may already wait.

    Making one is collective over the communicator; ranks that neither attend nor hold experts do only that, and close.
    It raises XcclUsageError if an argument differs between ranks (naming it and the rank), XcclOutOfMemory if the
    address space does not suffice.

    Parameters
    ----------
    comm : Communicator
    attention_ranks : ranks, or a list of such lists
        Who attends; lists are domains. Order within a domain does not matter.
    expert_ranks : ranks
        Who holds experts: others than those. Order does not matter.
    num_experts : int
        Experts of all expert ranks together; any number.
    hidden : int
        Elements of a row.
    num_topk : int
        Expert slots of a token.
    num_max_tokens_per_rank : int
        The most tokens that an attention rank sends at once.
    dtype : float32, float16 or bfloat16
    quant : None or "int8"
        How A2E carries rows: as they are, or as int8 with one float32 scale a row (max|x| / 127). E2A always carries
        dtype.
    expert_map : int [num_experts], optional
        The rank of each expert, one of expert_ranks. Default: contiguous blocks over the ascending expert ranks, sizes
        differ by at most one, larger blocks first.
    path : "auto", "direct" or "trampoline"
        "auto" takes the trampoline path for domains with fewer attention ranks than there are expert ranks.
    timeout : float, optional
        Seconds, as in every blocking call; the default is that of xccl.init.

    Attributes
    ----------
    comm, num_experts, hidden, num_topk, num_max_tokens_per_rank, dtype, quant, path
        As given.
    paths : tuple of "direct" or "trampoline"
        What each domain takes.
    domains : tuple of tuples of int
        The attention ranks of each domain, ascending.
    domain : int or None
        The domain of this rank, if it attends.
    expert_ranks : tuple of int
        Ascending.
    role : "attention", "expert" or None
        What this rank does.
    expert_map : int32 [num_experts]
    local_experts : int64 [num_local_experts]
        Ids of this rank's experts, ascending; "local expert i" is local_experts[i].
    num_local_experts : int
    """

    def __init__(
        self,
        comm: Communicator,
        attention_ranks: Sequence[int] | Sequence[Sequence[int]],
        expert_ranks: Sequence[int],
        num_experts: int,
        hidden: int,
        num_topk: int,
        num_max_tokens_per_rank: int,
        dtype: DTypeLike = "bfloat16",
        quant: Quant = None,
        expert_map: ArrayLike | None = None,
        *,
        path: Path = "auto",
        timeout: float | None = None,
    ) -> None:
        roles = make_roles(
            attention_ranks, expert_ranks, num_experts, hidden, num_topk, num_max_tokens_per_rank, dtype, quant,
            expert_map, path,
        )  # fmt: skip
        self.comm = comm
        self.num_experts, self.hidden, self.num_topk = num_experts, hidden, num_topk
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.dtype, self.quant, self.path = row_dtype(dtype), quant, path
        self.domains = tuple(tuple(domain.attention_ranks.tolist()) for domain in roles.domains)
        self.expert_ranks = tuple(roles.expert_ranks.tolist())
        self.domain = next((i for i, ranks in enumerate(self.domains) if comm.rank in ranks), None)
        self.role: Literal["attention", "expert"] | None = None
        if self.domain is not None:
            self.role = "attention"
        elif comm.rank in self.expert_ranks:
            self.role = "expert"
        self._c: list[Any] = []  # one for each domain; empty when closed
        self._pools: list[RowPool] = []
        self._discards: list[Any] = []
        for domain in roles.domains:
            self._open(roles, domain, timeout)
        self.paths = tuple(_PATH_NAMES[lib.xccl_ae_taken_path(c)] for c in self._c)
        # checked by the C core now
        self.expert_map = roles.expert_ranks[roles.owner]
        self.local_experts = np.flatnonzero(self.expert_map == comm.rank)
        self.num_local_experts = len(self.local_experts)
        self._batch, self._num_recv = ffi.new("uint64_t *"), ffi.new("int64_t *")
        self._sent: list[tuple[int, int]] = []  # (micro-batch, tokens) that no e2a has taken, oldest first
        self._in_flight: set[Any] = set()  # handles, and micro-batches of this attention rank
        self._unreceived: dict[int, A2EHandle] = {}  # by domain: begun by an a2e_recv that did not end well
        self._next_domain = 0
        self._failure = ""

    def _open(self, roles: Any, domain: Any, timeout: float | None) -> None:
        out, offset, nbytes = ffi.new("xccl_ae_t **"), ffi.new("uint64_t *"), ffi.new("uint64_t *")
        check(
            lib.xccl_ae_open(
                self.comm._handle(), domain.config, domain.pointer(), roles.experts_pointer(), roles.owner_pointer(),
                timeout_ns(timeout), out,
            )
        )  # fmt: skip
        self._c.append(out[0])
        self._discards.append(weakref.finalize(self, lib.xccl_ae_discard, out[0]))
        lib.xccl_ae_pool(out[0], offset, nbytes)
        self._pools.append(RowPool(self.comm._world, int(offset[0]), int(nbytes[0])))

    @staticmethod
    def buffer_bytes(
        attention_ranks: Sequence[int] | Sequence[Sequence[int]],
        expert_ranks: Sequence[int],
        num_experts: int,
        hidden: int,
        num_topk: int,
        num_max_tokens_per_rank: int,
        dtype: DTypeLike = "bfloat16",
        quant: Quant = None,
        expert_map: ArrayLike | None = None,
        *,
        path: Path = "auto",
    ) -> BufferBytes:
        """What the constructor will take on each rank, computed by the same code. Not collective.

        Raises XcclUsageError for arguments that the constructor would refuse.
        """
        return make_roles(
            attention_ranks, expert_ranks, num_experts, hidden, num_topk, num_max_tokens_per_rank, dtype, quant,
            expert_map, path,
        ).buffer_bytes()  # fmt: skip

    @property
    def metadata_updates(self) -> int:
        """Fields and signals that this rank has written into other ranks' metadata areas so far.

        An attention rank's `a2e` writes one on the trampoline path, one an expert rank on the direct path.
        """
        return sum(int(lib.xccl_ae_updates(c)) for c in self._c)

    # ---- attention ranks ----

    def a2e(self, x: Array, topk_idx: NDArray[np.int64], topk_weights: NDArray[np.float32] | None = None) -> None:
        """Sends each token to the ranks of its experts; `e2a` brings the sums of their outputs. On attention ranks.

        Does not wait for anybody: the arguments may be reused on return. Two micro-batches may be in flight; a third
        raises XcclUsageError, as do arguments that do not fit, naming argument, index, got and expected.

        Parameters
        ----------
        x : dtype [num_tokens, hidden]
        topk_idx : int64 [num_tokens, num_topk]
            Experts of each token, -1 for none. A token that names an expert twice arrives there twice.
        topk_weights : float32 [num_tokens, num_topk], optional
            Weights of the sum, 1 by default.
        """
        domain = self._attention("a2e")
        rows = self._rows("a2e", "x", x)
        num_tokens = x.shape[0]
        slots = self._slots("a2e", "topk_idx", topk_idx, num_tokens, _INT64)
        weights = self._weights("a2e", topk_weights, num_tokens)
        check(lib.xccl_ae_a2e(domain, rows, num_tokens, slots, weights, self._batch))
        batch = int(self._batch[0])
        self._sent.append((batch, num_tokens))
        self._in_flight.add(batch)

    def e2a(self, *, out: Array | None = None, timeout: float | None = None) -> Array:
        """Weighted sum of each token's expert outputs, for the oldest `a2e` that has none yet. On attention ranks.

        The sum runs in float32 over the slots of topk_idx in ascending order and is rounded once. A token without
        experts gives zeros. Returns [num_tokens, hidden]. After XcclTimeout, which names the ranks that are missing, it
        may be called again; nothing is lost.

        Parameters
        ----------
        out : dtype [num_tokens, hidden], optional
            Where to put the result.
        """
        batch, num_tokens = self._oldest("e2a", out)
        result = self._take(batch, num_tokens, out, timeout)
        self._sent.pop(0)
        return result

    def e2a_async(self, *, out: Array | None = None) -> Hook[Array]:
        """As e2a, but returns at once; `hook()` waits and returns the sums. Two hooks may be called in any order."""
        batch, num_tokens = self._oldest("e2a", out)
        self._sent.pop(0)
        return Hook("e2a", lambda timeout: self._take(batch, num_tokens, out, timeout))

    def _oldest(self, operation: str, out: Array | None) -> tuple[int, int]:
        self._attention(operation)
        if not self._sent:
            raise self._error(operation, "no micro-batch waits for it: call a2e first")
        if out is not None:
            self._rows(operation, "out", out, write=True)
            if out.shape[0] != self._sent[0][1]:
                raise self._error(operation, f"out has {out.shape[0]} rows, expected {self._sent[0][1]}")
        return self._sent[0]

    def _take(self, batch: int, num_tokens: int, out: Array | None, timeout: float | None) -> Array:
        domain = self._attention("e2a")
        result = np.empty((num_tokens, self.hidden), self.dtype) if out is None else out
        check(lib.xccl_ae_e2a(domain, batch, writable(result, "out", "e2a"), timeout_ns(timeout)))
        self._in_flight.discard(batch)
        return result

    # ---- expert ranks: receive ----

    @overload
    def a2e_recv(
        self,
        *,
        domain: int | None = ...,
        out: Array | None = ...,
        dequantize: Literal[True] = ...,
        timeout: float | None = ...,
    ) -> Rows: ...

    @overload
    def a2e_recv(
        self,
        *,
        domain: int | None = ...,
        out: Array | None = ...,
        dequantize: Literal[False],
        timeout: float | None = ...,
    ) -> RawRows: ...

    def a2e_recv(
        self,
        *,
        domain: int | None = None,
        out: Array | None = None,
        dequantize: bool = True,
        timeout: float | None = None,
    ) -> Rows | RawRows:
        """Receives the next micro-batch of a domain: the tokens of this rank's experts. On all expert ranks.

        After XcclTimeout, which names the ranks that are missing, it may be called again; nothing is lost.

        Parameters
        ----------
        domain : int, optional
            Whose turn it is; the same on all expert ranks. Default: the one after the last, in rotation.
        out : dtype [at least num_recv, hidden], optional
            Where to put the rows; its first num_recv rows are returned. int8 with dequantize=False.
        dequantize : bool
            With quant="int8": False gives the int8 rows and their scales instead of rows in dtype.

        Returns
        -------
        recv_x : dtype [num_recv, hidden]
            Sorted by (local expert, source attention rank, token): ready for a grouped matrix product. It is the
            caller's until garbage-collected. With dequantize=False a pair (int8 rows, float32 scales [num_recv]).
        handle : A2EHandle
            Rows of each local expert, where they come from; e2a_send takes it.
        """
        handle = self._begin(domain, out, dequantize)
        try:
            return self._receive(handle, out, dequantize, timeout)
        except BaseException:
            self._unreceived[handle.domain] = handle
            self._next_domain = handle.domain
            raise

    def a2e_recv_async(
        self, *, domain: int | None = None, out: Array | None = None, dequantize: bool = True
    ) -> Hook[Any]:
        """As a2e_recv, but returns at once; `hook()` waits and returns (recv_x, handle).

        A trampoline whose tokens have come already tells the other expert ranks about them before it returns. Two
        micro-batches of a domain may be in flight until their e2a_send is complete; a third raises XcclUsageError.
        """
        handle = self._begin(domain, out, dequantize)
        return Hook("a2e_recv", lambda timeout: self._receive(handle, out, dequantize, timeout))

    def _begin(self, domain: int | None, out: Array | None, dequantize: bool) -> A2EHandle:
        self._experts_here("a2e_recv")
        if not dequantize and self.quant is None:
            raise self._error("a2e_recv", "dequantize=False needs quant='int8'")
        if out is not None:
            self._rows("a2e_recv", "out", out, self.dtype if dequantize else INT8, write=True)
        number = self._next_domain if domain is None else domain
        if not isinstance(number, (int, np.integer)) or not 0 <= number < len(self._c):
            raise self._error("a2e_recv", f"domain is {domain!r}, expected 0 to {len(self._c) - 1}")
        handle = self._unreceived.pop(number, None)
        if handle is None:
            check(lib.xccl_ae_recv_begin(self._c[number], self._batch))
            handle = A2EHandle(self, int(number), int(self._batch[0]))
            self._in_flight.add(handle)
        self._next_domain = (number + 1) % len(self._c)
        return handle

    def _receive(self, handle: A2EHandle, out: Array | None, dequantize: bool, timeout: float | None) -> Rows | RawRows:
        domain = self._experts_here("a2e_recv")[handle.domain]
        counts = np.empty(self.num_local_experts, np.int32)
        check(
            lib.xccl_ae_recv_wait(
                domain, handle._batch, timeout_ns(timeout), self._num_recv, ffi.from_buffer(_INT32S, counts)
            )
        )
        n = self._num_recv[0]
        room = self._room("a2e_recv", n, out, dequantize, self._pools[handle.domain])
        check(lib.xccl_ae_recv_pull(domain, handle._batch, *room.pointers("a2e_recv")))
        handle.num_recv, handle.num_recv_tokens_per_expert, handle._sources = n, counts, room.sources
        return room.rows(), handle

    # ---- expert ranks: send ----

    def e2a_send(self, y: Array, handle: A2EHandle, *, timeout: float | None = None) -> None:
        """Sends the experts' outputs to where they are summed; a trampoline sums them. On all expert ranks.

        y may be changed on return. So a y in symmetric memory makes it wait until it has been read: on the direct path
        by the attention ranks in their e2a, on the trampoline path by trampolines in their e2a_send.

        Parameters
        ----------
        y : dtype [num_recv, hidden]
            Output for each row of recv_x, in its order. Rows must be contiguous, their distance may be larger. A y in
            this rank's symmetric memory (recv_x itself, `empty`, views of comm.zeros arrays) is read there by those
            who sum, any other is copied once.
        handle : A2EHandle
            Of the a2e_recv; each can be used once.
        """
        started = time.monotonic()
        self._publish(y, handle)
        try:
            self._finish(handle, time_left(timeout, started))
        except BaseException as error:
            self._fail("e2a_send", error)
            raise

    def e2a_send_async(self, y: Array, handle: A2EHandle) -> Hook[None]:
        """As e2a_send, but returns once this rank's outputs are published; `hook()` does the rest.

        A y in symmetric memory must not change before the hook has returned. A trampoline sums in the hook: its
        attention ranks wait for that.
        """
        self._publish(y, handle)
        return Hook("e2a_send", lambda timeout: self._finish(handle, timeout))

    def _publish(self, y: Array, handle: A2EHandle) -> None:
        domains = self._experts_here("e2a_send")
        if not isinstance(handle, A2EHandle) or handle._ae is not self:
            raise self._error("e2a_send", f"the handle is not one of this AttentionExpert's: {handle!r}")
        if hasattr(handle, "num_recv"):  # otherwise the C core says that a2e_recv has not completed
            self._outputs("e2a_send", y, handle.num_recv)
        check(lib.xccl_ae_send_begin(domains[handle.domain], handle._batch, *start_of(y)))
        handle._y = y

    def _finish(self, handle: A2EHandle, timeout: float | None) -> None:
        domain = self._experts_here("e2a_send")[handle.domain]
        check(lib.xccl_ae_send_finish(domain, handle._batch, timeout_ns(timeout)))
        handle._y = None
        self._in_flight.discard(handle)

    # ---- memory and end ----

    def empty(self, num_rows: int, *, domain: int = 0) -> Array:
        """An array of dtype [num_rows, hidden] with undefined content, for y: it is read there without a copy.

        It comes from the pool that a2e_recv uses for the domain, and is an ordinary array when that is used up. Not
        collective.
        """
        self._group("empty")
        return self._pools[domain].empty((num_rows, self.hidden), self.dtype)

    def close(self, *, timeout: float | None = None) -> None:
        """Gives the memory back; raises XcclUsageError while a micro-batch is in flight. Twice is no error. Collective.

        Arrays that a2e_recv and `empty` returned stay valid; if there are any, the pool's memory is kept until the
        world ends.
        """
        if not self._c:
            return
        self.comm._handle()
        if self._in_flight:
            raise self._error("close", f"{len(self._in_flight)} micro-batches are in flight: complete them first")
        while self._c:
            check(lib.xccl_ae_close(self._c[0], self._pools[0].live > 0, timeout_ns(timeout)))
            self._discards.pop(0).detach()
            self._c.pop(0), self._pools.pop(0)

    def __enter__(self) -> AttentionExpert:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an exception the others may be in the middle of an operation: do not wait for them.
        if kind is None:
            self.close()

    def __repr__(self) -> str:
        state = self.role or "takes no part" if self._c else "closed"
        return (
            f"<xccl.AttentionExpert {sum(map(len, self.domains))} attention ranks in {len(self.domains)} domains, "
            f"{self.num_experts} experts on {len(self.expert_ranks)} ranks ({state}), hidden {self.hidden}, "
            f"top-{self.num_topk}, {self.dtype}, quant {self.quant}>"
        )

    # ---- checks ----

    def _attention(self, operation: str) -> Any:
        """This attention rank's domain."""
        domains = self._group(operation)
        if self.domain is None:
            raise self._error(operation, f"for attention ranks {_listed(self.domains)}; this one is {self._who()}")
        return domains[self.domain]

    def _experts_here(self, operation: str) -> list[Any]:
        """All domains, on an expert rank."""
        domains: list[Any] = self._group(operation)
        if self.role != "expert":
            raise self._error(operation, f"for expert ranks {_listed([self.expert_ranks])}; this one is {self._who()}")
        return domains

    def _who(self) -> str:
        return f"an {self.role} rank" if self.role else "neither attention nor expert rank"


def _listed(groups: Sequence[Sequence[int]]) -> str:
    return " | ".join(", ".join(map(str, group)) for group in groups)
