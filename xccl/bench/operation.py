"""What an operation is to the runner: a record, and cases that run and can be checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from xccl.bench.libraries import Library
from xccl.bench.settings import DTYPES, Settings
from xccl.communicator import Communicator

Array = np.ndarray[Any, Any]

# MPI reduces no others, and gloo rounds the 16-bit ones more than once
COMMON_SUM_DTYPES = ("int8", "uint8", "int32", "int64", "float32", "float64")


class Context:
    """What cases are made from.

    Attributes
    ----------
    comm : Communicator
    library : Library or None
        What --vs compares with. Any, because a twin knows which one it is.
    settings : Settings
    dtype : numpy dtype
    """

    def __init__(self, comm: Communicator, settings: Settings, dtype: str, library: Library | None = None) -> None:
        self.comm = comm
        self.library: Any = library
        self.settings = settings
        self.dtype: np.dtype[Any] = np.dtype(DTYPES[dtype])
        self._symmetric: list[Any] = []

    @property
    def mpi(self) -> Any:
        """mpi4py.MPI, for a twin over MPI."""
        return self.library.module

    @property
    def world(self) -> Any:
        """MPI's communicator of all ranks."""
        return self.library.world

    def empty(self, count: int, symmetric: bool) -> Array:
        """An array of `count` elements. Collective if it is symmetric."""
        if symmetric:
            a = self.comm.empty(count, self.dtype)
            self._symmetric.append(a)
            return a
        a = np.empty(count, self.dtype)
        a.view(np.uint8)[...] = 0  # touched: a first touch of a page is not what is timed
        return a

    def signal(self) -> Any:
        """A signal. Collective."""
        signal = self.comm.signal()
        self._symmetric.append(signal)
        return signal

    def free(self) -> None:
        """Gives all symmetric arrays back. Collective."""
        for a in self._symmetric:
            self.comm.free(a)
        self._symmetric.clear()


class Case(ABC):
    """An operation at one size: its arrays, one call of it, and what must have arrived.

    A twin is a subclass whose `run` does the same by another library. Making one is collective.

    Attributes
    ----------
    calls : int
        Operations in one `run`: 2 for a ping-pong, whose half is one way.
    is_twin : bool
        True if it runs by another library: its arrays are never symmetric.
    nbytes : int
        The size of the row.
    results : list of (array, expected array)
        What this rank receives, one pair for each set of arrays.
    """

    calls = 1
    is_twin = False

    def __init__(self, context: Context, count: int) -> None:
        self.context = context
        self.comm = context.comm
        self.count = count
        self.buffers = context.settings.buffers
        self.nbytes = count * context.dtype.itemsize
        self.results: list[tuple[Array, Array]] = []
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Makes arrays and fills `results`."""

    def source(self, content: Array, *, symmetric: bool = False) -> Array:
        """An array with `content`, symmetric if --symmetric or the operation asks for it."""
        a = self.context.empty(content.size, symmetric or self.in_symmetric_memory)
        a[...] = content
        return a

    def receive(self, expected: Array, *, symmetric: bool = False) -> Array:
        """An array in which `expected` is to arrive."""
        out = self.context.empty(expected.size, symmetric or self.in_symmetric_memory)
        self.results.append((out, expected))
        return out

    def call(self, name: str, *args: Any, **keywords: Any) -> Callable[[], object]:
        """A method of the communicator with its arguments, prepared if --prepared asks for it."""
        if self.context.settings.prepared:
            return self.comm.prepare(name, *args, **keywords)
        return partial(getattr(self.comm, name), *args, **keywords)

    @property
    def in_symmetric_memory(self) -> bool:
        """Whether arrays are symmetric that need not be."""
        return self.context.settings.symmetric and not self.is_twin

    @abstractmethod
    def run(self, i: int) -> None:
        """The i-th call, counted from 0 in each block."""

    def before(self, i: int) -> None:
        """Work that the i-th call needs and that is not timed. If a class has it, calls are timed one by one."""
        raise NotImplementedError

    def settle(self) -> None:
        """After a block, untimed. MPI moves what is left only inside its calls, and the next wait is one of xccl's."""
        if self.is_twin:
            self.context.library.barrier()

    def note(self) -> str | None:
        """What the reader of the row must know."""
        return None

    def poison(self) -> None:
        """Makes every element that is to arrive wrong, so that only what arrives from now on is right."""
        for out, expected in self.results:
            np.invert(as_bytes(expected), out=as_bytes(out))

    def wrong(self, runs: int) -> int:
        """Elements on this rank that are not what must have arrived in a block of `runs` runs."""
        return sum(count_wrong(out, expected) for out, expected in self.results[:runs])

    def close(self) -> None:  # noqa: B027 - most cases take nothing else
        """Gives back what `prepare` took besides arrays. Collective."""


@dataclass(frozen=True)
class Versus:
    """How another library does an operation.

    Attributes
    ----------
    case : class
        The twin.
    does : str
        What the twin calls.
    dtypes : tuple of str
        Those that it can carry.
    """

    case: type[Case]
    does: str
    dtypes: tuple[str, ...] = tuple(DTYPES)


@dataclass(frozen=True)
class Operation:
    """The record of an operation.

    Attributes
    ----------
    size : str
        What "size" means, for the header.
    factor : callable
        Bus bandwidth / algorithm bandwidth on so many ranks. It times size is what crosses a rank's link at least.
    counts : callable
        The counts (of elements, or what the case takes) to measure, from settings, bytes of an element, ranks.
    versus : mapping
        What --vs has for this operation, by the names of LIBRARIES.
    dtypes : tuple of str
        Those that the operation can carry.
    can_prepare : bool
        Whether its case makes its calls with `Case.call`.
    """

    name: str
    size: str
    factor: Callable[[int], float]
    counts: Callable[[Settings, int, int], Sequence[int]]
    case: type[Case]
    versus: Mapping[str, Versus] = field(default_factory=dict)
    min_ranks: int = 1
    dtypes: tuple[str, ...] = tuple(DTYPES)
    default_dtype: str = "float32"
    can_prepare: bool = False


def elements(settings: Settings, itemsize: int, ranks: int) -> list[int]:
    """Counts of whole elements for the sizes asked for."""
    return sorted({max(size // itemsize, 1) for size in settings.sizes()})


def divisible_elements(settings: Settings, itemsize: int, ranks: int) -> list[int]:
    """The same, rounded down to a multiple of the ranks, at least one element for each."""
    return sorted({max(size // itemsize // ranks, 1) * ranks for size in settings.sizes()})


def once(settings: Settings, itemsize: int, ranks: int) -> list[int]:
    """For an operation without a size."""
    return [0]


def unit_factor(ranks: int) -> float:
    """Every byte crosses a link once."""
    return 1.0


def peers_factor(ranks: int) -> float:
    """All but the own part crosses a link."""
    return (ranks - 1) / ranks


def all_reduce_factor(ranks: int) -> float:
    """Every part goes to the rank that reduces it, and back."""
    return 2 * (ranks - 1) / ranks


def pattern(rank: int, buffer: int, count: int, dtype: np.dtype[Any], start: int = 0) -> Array:
    """Elements start ... start + count of what `rank` sends from set `buffer`: whole numbers from 1 to 64."""
    index = np.arange(start, start + count, dtype=np.uint32)
    index += np.uint32((rank * 0x9E3779B1 + buffer * 0x85EBCA6B) & 0xFFFFFFFF)
    index *= np.uint32(2654435761)  # Fibonacci hashing: neighbours differ, and so do blocks
    return ((index >> np.uint32(20)) % np.uint32(64) + np.uint32(1)).astype(dtype)


def pattern_sum(ranks: int, buffer: int, count: int, dtype: np.dtype[Any], start: int = 0) -> Array:
    """The sum of all ranks' patterns: exact before it is rounded (floats) or wrapped (integers) once."""
    total = np.zeros(count, np.int64)
    for rank in range(ranks):
        total += pattern(rank, buffer, count, np.dtype(np.int64), start)
    return total.astype(dtype)


def count_wrong(out: Array, expected: Array) -> int:
    """Elements whose bits differ."""
    if out.shape != expected.shape or out.dtype != expected.dtype:
        return max(out.size, expected.size)
    if np.array_equal(as_bytes(out), as_bytes(expected)):
        return 0
    different = as_bytes(out) != as_bytes(expected)
    return int(different.reshape(-1, out.itemsize).any(axis=1).sum())


def as_bytes(a: Array) -> Array:
    """The bytes of a contiguous array: MPI knows no bfloat16."""
    return a.reshape(-1).view(np.uint8)
