"""The shape of an MoE layer as the C core takes it, and the memory that it needs."""

from __future__ import annotations

import contextlib
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from xccl._binding import ffi, lib
from xccl.errors import XcclUsageError
from xccl.options import rc
from xccl.reference import default_expert_map

Quant = Literal["int8"] | None
OnMissing = Literal["raise", "renormalize", "zero"]

_DTYPES = {
    np.dtype(np.float32): lib.XCCL_FLOAT32,
    np.dtype(np.float16): lib.XCCL_FLOAT16,
    np.dtype(ml_dtypes.bfloat16): lib.XCCL_BFLOAT16,
}
_QUANTS = {None: lib.XCCL_QUANT_NONE, "int8": lib.XCCL_QUANT_INT8}
_ON_MISSING = {
    "raise": lib.XCCL_MISSING_RAISE,
    "renormalize": lib.XCCL_MISSING_RENORMALIZE,
    "zero": lib.XCCL_MISSING_ZERO,
}
_SIMD = {
    "auto": lib.XCCL_SIMD_AUTO,
    "scalar": lib.XCCL_SIMD_SCALAR,
    "avx2": lib.XCCL_SIMD_AVX2,
    "avx512": lib.XCCL_SIMD_AVX512,
}


class BufferBytes(NamedTuple):
    """Address space that an ExpertParallel or AttentionExpert takes on each rank, in bytes.

    Pages are reserved only up to what routings really used: the memory is at most this, usually much less.
    """

    metadata: int  # fields and signals
    staging: int  # rows on their way, of two dispatches and two combines
    pool: int  # received rows and expert outputs of the caller

    @property
    def total(self) -> int:
        """Sum of the three."""
        return sum(self)


def row_dtype(dtype: DTypeLike, who: str = "ExpertParallel") -> np.dtype[Any]:
    """The dtype of rows; raises XcclUsageError unless it is float32, float16 or bfloat16."""
    with contextlib.suppress(TypeError):  # NumPy does not know it
        kind = np.dtype(dtype)
        if kind in _DTYPES:
            return kind
    raise XcclUsageError(f"{who}: dtype is {dtype!r}, expected one of {', '.join(map(str, _DTYPES))}")


def on_missing_code(on_missing: OnMissing, operation: str) -> int:
    """What to do about missing experts, as the C core takes it; raises XcclUsageError unless it is one of the three."""
    if on_missing not in _ON_MISSING:
        raise XcclUsageError(f"{operation}: on_missing is {on_missing!r}, expected 'raise', 'renormalize' or 'zero'")
    return int(_ON_MISSING[on_missing])


def make_config(
    num_ranks: int,
    num_experts: int,
    hidden: int,
    num_topk: int,
    num_max_tokens_per_rank: int,
    dtype: DTypeLike,
    quant: Quant,
    expert_map: ArrayLike | None,
    on_missing: OnMissing = "raise",
    who: str = "ExpertParallel",
) -> tuple[Any, NDArray[np.int32]]:
    """The configuration for the C core, which checks the numbers, and the owner of each expert, -1 for none."""
    if quant not in _QUANTS:
        raise XcclUsageError(f"{who}: quant is {quant!r}, expected None or 'int8'")
    numbers = {
        "num_experts": num_experts,
        "hidden": hidden,
        "num_topk": num_topk,
        "num_max_tokens_per_rank": num_max_tokens_per_rank,
    }
    for name, value in numbers.items():
        if not isinstance(value, (int, np.integer)) or not -(2**63) <= value < 2**63:
            raise XcclUsageError(f"{who}: {name} must be a 64-bit integer, got {value!r}")
    config = ffi.new("xccl_moe_config_t *")
    config.num_experts, config.hidden = num_experts, hidden
    config.num_topk, config.num_max_tokens = num_topk, num_max_tokens_per_rank
    config.dtype, config.quant, config.simd = _DTYPES[row_dtype(dtype, who)], _QUANTS[quant], _SIMD[rc.simd]
    config.on_missing = on_missing_code(on_missing, who)
    if not 1 <= num_experts < 1 << 31 or num_ranks < 1:
        return config, np.zeros(1, np.int32)  # refused by the C core
    owner = default_expert_map(num_experts, num_ranks) if expert_map is None else np.asarray(expert_map)
    if owner.shape != (num_experts,) or owner.dtype.kind not in "iu":
        raise XcclUsageError(
            f"{who}: expert_map is {owner.dtype} {list(owner.shape)}, expected the rank of each expert: "
            f"integers [{num_experts}]"
        )
    wrong = np.flatnonzero((owner < -1) | (owner >= num_ranks))
    if len(wrong):
        raise XcclUsageError(
            f"{who}: expert_map[{wrong[0]}] is {owner[wrong[0]]}, expected a rank from 0 to {num_ranks - 1}, "
            "or -1 for none"
        )
    owner = owner.astype(np.int32)
    owner.flags.writeable = False
    return config, owner
