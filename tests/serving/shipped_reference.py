"""Keep a part of PyTorch's logits of the shipped model, to compare the NumPy forward with.

After a new training run:

    python examples/train_tiny_moe/export.py --data ... --weights ... --reference reference.npz
    python tests/serving/shipped_reference.py reference.npz
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

import xccl.serving

MODEL = Path(xccl.serving.__file__).parent / "model"
KEPT = Path(__file__).parent / "shipped_reference.npz"
EVERY = 9  # of 64 positions: the first, the last and six between


def fingerprint() -> str:
    """SHA-256 of the shipped weights."""
    return hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()


def keep(reference: Path) -> None:
    """Write KEPT from the file that export.py wrote."""
    full = np.load(reference)
    rows = np.arange(0, full["tokens"].size, EVERY)
    np.savez_compressed(
        KEPT,
        weights=fingerprint(),
        tokens=full["tokens"][0],
        next_tokens=full["next_tokens"][0],
        rows=rows,
        logits=full["logits"][rows],
        mtp_logits=full["mtp_logits"][rows],
    )


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
