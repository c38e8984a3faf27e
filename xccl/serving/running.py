"""The running requests of one rank as arrays, one entry a slot."""

from __future__ import annotations

import numpy as np

from xccl.serving.arrays import BoolArray, FloatArray, IntArray
from xccl.serving.request import FinishReason, Request
from xccl.serving.sampling import SamplingBatch, request_keys

NO_DRAFT = -1


class RunningRequests:
    """Tokens, lengths, drafts and sampling parameters of all slots, so that a step handles them without a loop.

    ``tokens`` [slots, max_context] holds prompt and generated tokens; ``draft`` the token proposed next, or NO_DRAFT.
    ``length[slot]`` counts known tokens, prompt included; ``computed[slot]`` counts prompt positions whose KV is in
    the cache. ``limit[slot]`` is the length at which the request must end.
    """

    def __init__(self, num_slots: int, max_context: int, eot_token: int) -> None:
        self._max_context = max_context
        self._eot = eot_token
        self.tokens: IntArray = np.zeros((num_slots, max_context), np.int64)
        self.length: IntArray = np.zeros(num_slots, np.int64)
        self.prompt_length: IntArray = np.zeros(num_slots, np.int64)
        self.computed: IntArray = np.zeros(num_slots, np.int64)
        self.limit: IntArray = np.zeros(num_slots, np.int64)
        self.draft: IntArray = np.full(num_slots, NO_DRAFT, np.int64)
        self.active: BoolArray = np.zeros(num_slots, np.bool_)
        self._context_bound: BoolArray = np.zeros(num_slots, np.bool_)
        self._temperature: FloatArray = np.zeros(num_slots, np.float32)
        self._top_p: FloatArray = np.ones(num_slots, np.float32)
        self._keys = np.zeros(num_slots, np.uint64)

    def start(self, slot: int, request: Request) -> None:
        """Put a request into a free slot."""
        count = len(request.prompt_tokens)
        self.tokens[slot, :count] = request.prompt_tokens
        self.length[slot] = self.prompt_length[slot] = count
        self.computed[slot] = 0
        self.limit[slot] = length_limit(request, self._max_context)
        self.draft[slot] = NO_DRAFT
        self.active[slot] = True
        params = request.sampling
        self._context_bound[slot] = count + params.max_tokens > self._max_context
        self._temperature[slot] = params.temperature
        self._top_p[slot] = params.top_p
        noise_id = request.request_id if request.noise_id is None else request.noise_id
        self._keys[slot] = request_keys(np.array([params.seed]), np.array([noise_id]))[0]

    def stop(self, slot: int) -> None:
        """Free a slot."""
        self.active[slot] = False

    def decoding(self) -> IntArray:
        """Slots whose prompt is computed, ascending."""
        return np.flatnonzero(self.active & (self.computed == self.prompt_length))

    def verifiable(self, slots: IntArray) -> BoolArray:
        """Whether each slot has a draft that could lead to a second token in this step."""
        verifiable: BoolArray = (self.draft[slots] != NO_DRAFT) & (self.length[slots] + 1 < self.limit[slots])
        return verifiable

    def sampling_batch(self, slots: IntArray, positions: IntArray) -> SamplingBatch:
        """Parameters for choosing the tokens at ``positions`` of ``slots``."""
        return SamplingBatch(self._temperature[slots], self._top_p[slots], self._keys[slots], positions)

    def append(self, slots: IntArray, tokens: IntArray) -> None:
        """Add one token to each of the distinct ``slots``."""
        self.tokens[slots, self.length[slots]] = tokens
        self.length[slots] += 1

    def ended(self, slots: IntArray) -> BoolArray:
        """Whether the last token of each slot ends its request."""
        last = self.tokens[slots, self.length[slots] - 1]
        ended: BoolArray = (last == self._eot) | (self.length[slots] >= self.limit[slots])
        return ended

    def finish_reason(self, slot: int) -> FinishReason:
        """Why the request of a slot for which :meth:`ended` is true has ended."""
        if self.tokens[slot, self.length[slot] - 1] == self._eot:
            return "stop"
        return "context" if self._context_bound[slot] else "length"

    def generated(self, slot: int) -> list[int]:
        """Tokens generated so far."""
        tokens: list[int] = self.tokens[slot, self.prompt_length[slot] : self.length[slot]].tolist()
        return tokens


def length_limit(request: Request, max_context: int) -> int:
    """Tokens, prompt included, at which a request ends at the latest."""
    return min(len(request.prompt_tokens) + request.sampling.max_tokens, max_context)
