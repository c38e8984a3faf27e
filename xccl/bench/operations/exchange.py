"""What the collectives with an input and an output array on every rank share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

from xccl.bench.operation import Array, Case


class Exchange(Case):
    """A collective `comm.<method>(x, out=out)` on each set of arrays in turn."""

    method: ClassVar[str]

    @abstractmethod
    def pair(self, buffer: int) -> tuple[Array, Array]:
        """x and out of one set of arrays, made by `source` and `receive`."""

    def call_of(self, x: Array, out: Array) -> Callable[[], object]:
        """The call on one set of arrays; a twin has its own."""
        return self.call(self.method, x, out=out)

    def prepare(self) -> None:
        self.ready = [self.call_of(*self.pair(buffer)) for buffer in range(self.buffers)]

    def run(self, i: int) -> None:
        self.ready[i % self.buffers]()
