"""RMS normalisation."""

import numpy as np

from xccl.serving.arrays import FloatArray


def rms_norm(x: FloatArray, weight: FloatArray, eps: float) -> FloatArray:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis."""
    mean_square: FloatArray = np.add.reduce(x * x, axis=-1, keepdims=True)
    mean_square /= np.float32(x.shape[-1])
    normed: FloatArray = x / np.sqrt(mean_square + np.float32(eps))
    normed *= weight
    return normed
