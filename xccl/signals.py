"""Symmetric signals: the words that put_signal and signal_op write and wait_until waits for."""

from __future__ import annotations

from typing import Any

import numpy as np

from xccl._binding import array_address, ffi
from xccl.errors import XcclUsageError

_WORDS_PER_LINE = 8  # uint64 words of a 64-byte cache line


class Signal:
    """`n` symmetric uint64 words, each on a cache line of its own. Made by `comm.signal(n)`; zero at first.

    `sig[i]` is the i-th one (itself a Signal of one word); operations take a single word, and a Signal of
    n == 1 may be used as it is. `sig.value` reads the own copy without waiting.
    """

    def __init__(self, words: np.ndarray[Any, Any]) -> None:
        self.words = words

    @property
    def n(self) -> int:
        """Number of words."""
        return int(self.words.shape[0]) // _WORDS_PER_LINE

    @property
    def pointer(self) -> Any:
        """The first word of the own copy, as a C pointer."""
        return ffi.cast("uint64_t *", array_address(self.words))

    @property
    def value(self) -> int:
        """This rank's copy, read once. Says nothing about other memory: wait_until does."""
        self.single("value")
        return int(self.words[0])

    def __getitem__(self, index: int) -> Signal:
        if not -self.n <= index < self.n:
            raise IndexError(f"signal {index} of {self.n}")
        start = index % self.n * _WORDS_PER_LINE
        return Signal(self.words[start : start + _WORDS_PER_LINE])

    def __len__(self) -> int:
        return self.n

    def __repr__(self) -> str:
        return f"<xccl.Signal n={self.n} values={self.words[::_WORDS_PER_LINE].tolist()}>"

    def single(self, operation: str) -> int:
        """Address of the one word; raises XcclUsageError if there are several."""
        if self.n != 1:
            raise XcclUsageError(f"{operation}: this signal has {self.n} words, name one of them: signal[i]")
        return array_address(self.words)


def words_for(n: int) -> int:
    """Number of uint64 to allocate for n signals."""
    if n < 1:
        raise XcclUsageError(f"signal: n must be at least 1, got {n}")
    return n * _WORDS_PER_LINE
