"""Files of a run: the checkpoint it goes on from, and the model it ends with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from precoder.config import TrainConfig

CHECKPOINT = "checkpoint.pt"
MODEL = "model.pt"


def write(path: Path, content: dict[str, Any]) -> None:
    """Replaces the file as a whole: whoever is killed here leaves the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote. Raises ValueError if it is not such a file, FileNotFoundError if there is none."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: train first, or give another --out")
    try:
        content = torch.load(path, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a file that precoder wrote: {error}") from error
    if not isinstance(content, dict) or "config" not in content:
        raise ValueError(f"{path} is not a file that precoder wrote: it has no configuration")
    return content


def read_model(folder: Path) -> tuple[TrainConfig, Tensor, dict[str, Any]]:
    """The configuration, the averaged parameters and the cost of a finished run."""
    content = read(folder / MODEL)
    return TrainConfig(**content["config"]), content["parameters"], content["cost"]
