"""The objective: the weighted sum rate."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_sum_rate(gains: Tensor, alpha: Tensor) -> Tensor:
    """sum_k alpha_k log2(1 + SINR_k) in bit/s/Hz, [B], for noise of power 1.

    `gains` [B, K, K] are the received powers |h_i^H v_j|^2 of stream j at user i.
    """
    total = gains.sum(-1) + 1
    signal = gains.diagonal(0, -2, -1)
    return (alpha * (torch.log2(total) - torch.log2(total - signal))).sum(-1)


def rate_of_precoder(h: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
    """Weighted sum rate [B] of the precoder v, complex [B, N, K], on the scaled channels h."""
    return weighted_sum_rate((h.mH @ v).abs().square(), alpha)
