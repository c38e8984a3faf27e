"""What the user asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from xccl.errors import XcclUsageError

DTYPES: dict[str, DTypeLike] = {
    "int8": np.int8,
    "uint8": np.uint8,
    "int32": np.int32,
    "int64": np.int64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Settings:
    """One call of `xccl bench`. The same on all ranks.

    Attributes
    ----------
    begin, end, factor
        Sizes in bytes: begin, begin * factor, ... up to end.
    iterations : int or None
        Calls in a block; None: as many as fill BLOCK_SECONDS.
    pin : bool or None
        None: if each rank can have a core.
    dtype : str or None
        None: the operation's own default.
    workload, shape, tokens, seed
        Of the MoE operations: see `workload`; tokens of a rank.
    buffers : int
        Each call takes the next of so many sets of arrays.
    """

    operation: str
    begin: int = 8
    end: int = 8 << 20
    factor: int = 4
    warmup: int = 5
    iterations: int | None = None
    blocks: int = 20
    pin: bool | None = None
    dtype: str | None = None
    symmetric: bool = False
    buffers: int = 2
    versus: str | None = None
    prepared: bool = False
    workload: str = "uniform"
    shape: str = "deepseek"
    tokens: tuple[int, ...] = (1, 8, 32, 128)
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"begin": 1, "factor": 2, "warmup": 0, "blocks": 1, "buffers": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise XcclUsageError(f"bench: {name} is at least {minimum}, got {getattr(self, name)}")
        if self.iterations is not None and self.iterations < 1:
            raise XcclUsageError(f"bench: iterations is at least 1, got {self.iterations}")
        if min(self.tokens, default=0) < 1:
            raise XcclUsageError(f"bench: numbers of tokens are at least 1, got {self.tokens}")
        if self.end < self.begin:
            raise XcclUsageError(f"bench: the last size, {self.end}, is smaller than the first, {self.begin}")

    def sizes(self) -> list[int]:
        """The sizes asked for, in bytes."""
        sizes = [self.begin]
        while sizes[-1] * self.factor <= self.end:
            sizes.append(sizes[-1] * self.factor)
        return sizes


def parse_size(text: str) -> int:
    """Bytes from "8", "64K", "8M" or "1G" (powers of 1024). Raises ValueError."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text.strip().upper())
    if match is None:
        raise ValueError(f"a size is a number of bytes such as 8, 64K, 8M or 1G, got {text!r}")
    return int(match[1]) * _UNITS[match[2]]
