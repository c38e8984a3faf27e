"""Expert parallelism that goes on without some ranks: an agreed mask, and the experts that survivors have."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xccl._binding import check, ffi, lib, timeout_ns
from xccl.communicator import Communicator
from xccl.moe_group import MoeGroup

_BYTES = ffi.typeof("unsigned char[]")


class LiveExperts(MoeGroup):
    """Which experts get tokens: those whose rank is alive."""

    expert_map: NDArray[np.int32]
    _alive: NDArray[np.bool_]
    _world_ranks: NDArray[np.int64]  # of each member

    @property
    def alive(self) -> NDArray[np.bool_]:
        """What set_alive agreed on, bool [comm.size]: at first all True. Read-only."""
        return self._alive

    @property
    def live_experts(self) -> NDArray[np.bool_]:
        """Experts that get tokens, bool [num_experts]: those whose rank is alive. For a gate that avoids the others."""
        return (self.expert_map >= 0) & self._alive[self.expert_map]

    def set_alive(self, mask: ArrayLike, *, timeout: float | None = None) -> None:
        """Says whose experts get tokens from the next dispatch on: rank r's if mask[r]. Collective.

        For ranks that live but shall not work: maintenance, a straggler, experts not yet loaded. They go on to take
        part in every call, with tokens of their own if they have some; any rank, this one and all of them too, may be
        marked. After a death use `Communicator.shrink` and `expert_map_on`.

        A handle keeps the mask of its dispatch, so operations may be in flight. Returns when all ranks have come.

        Raises XcclUsageError on all ranks, naming rank, got and expected, if the mask is not the same on all of them;
        then nothing was changed.

        Parameters
        ----------
        mask : bool [comm.size]
        """
        group = self._group("set_alive")
        alive = np.array(mask)
        if alive.shape != (self.comm.size,) or alive.dtype != np.bool_:
            got = f"{alive.dtype} {list(alive.shape)}"
            raise self._error("set_alive", f"mask is {got}, expected bool [{self.comm.size}], one a rank")
        check(lib.xccl_moe_set_alive(group, ffi.from_buffer(_BYTES, alive.view(np.uint8)), timeout_ns(timeout)))
        alive.flags.writeable = False
        self._alive = alive

    def expert_map_on(self, comm: Communicator) -> NDArray[np.int32]:
        """The rank in `comm` of each expert's owner, int32 [num_experts], -1 where it is not in there. Not collective.

        As expert_map of a new ExpertParallel it keeps the numbers of experts when ranks have gone: `comm` is what
        `Communicator.shrink` (or split) made.
        """
        ranks = np.full(self.comm.size + 1, -1, np.int32)  # the last is for experts without owner
        members = {int(lib.xccl_comm_world_rank(comm._handle(), pe)): pe for pe in range(comm.size)}
        for rank, world_rank in enumerate(self._world_ranks):
            ranks[rank] = members.get(int(world_rank), -1)
        return ranks[self.expert_map]
