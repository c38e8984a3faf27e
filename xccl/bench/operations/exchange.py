"""What the collectives with an input and an output array on every rank share."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from xccl.bench.operation import Array, Case, as_bytes


class Exchange(Case):
    """A collective `comm.<method>(x, out=out)` on each set of arrays in turn."""

    method: ClassVar[str]

    @abstractmethod
    def pair(self, buffer: int) -> tuple[Array, Array]:
        """x and out of one set of arrays, made by `source` and `receive`."""

    def prepare(self) -> None:
        self.pairs = [self.pair(buffer) for buffer in range(self.buffers)]
        if not self.is_twin:
            self.ready = [self.call(self.method, x, out=out) for x, out in self.pairs]

    def run(self, i: int) -> None:
        self.ready[i % self.buffers]()


class BytesByMpi(Exchange):
    """A twin that hands its arrays to MPI as bytes: MPI knows not every dtype."""

    is_twin = True

    def prepare(self) -> None:
        super().prepare()
        self.pairs = [(as_bytes(x), as_bytes(out)) for x, out in self.pairs]
