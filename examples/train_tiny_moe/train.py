"""Train the model: a fixed number of steps on one thread, so that a run repeats by its seed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from model import Config, TinyMoE
from optimizer import Muon
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from text import Document, load
from tokenizer import END_OF_TEXT
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

MTP_LOSS_WEIGHT = 0.3
MUON_RATE = 0.03
ADAM_RATE = 4e-3
BIAS_STEP = 0.002
# Only experts outside this range of the mean load have their bias moved: load stays skewed, never collapses.
LOAD_LOW, LOAD_HIGH = 0.5, 2.0


def token_stream(documents: list[Document], tokenizer: Tokenizer) -> np.ndarray:
    """All documents one after the other, end-of-text before each."""
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    encodings = tokenizer.encode_batch([document.text for document in documents])
    return np.concatenate([np.array([end_of_text, *encoding.ids], np.int64) for encoding in encodings])


def windows(stream: np.ndarray, length: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield batches [batch, length + 2] for ever: each epoch cuts at another offset and shuffles."""
    if len(stream) < (batch + 2) * length:
        raise ValueError(f"{len(stream)} tokens of text are too few for a batch of {batch} x {length} tokens")
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.permutation(np.arange(rng.integers(length), len(stream) - length - 1, length))
        for first in range(0, len(starts) - batch + 1, batch):
            rows = starts[first : first + batch, None] + np.arange(length + 2)
            yield torch.from_numpy(stream[rows])


def optimizers(model: TinyMoE, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks; AdamW for embedding, head, routers, norms."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        outside = name.startswith(("embed.", "head.")) or ".router." in name or parameter.ndim == 1
        (rest if outside else matrices).append(parameter)
    return [
        Muon(matrices, lr=rate * MUON_RATE),
        torch.optim.AdamW(rest, lr=rate * ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def losses(model: TinyMoE, window: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the next token and, by MTP, of the one after."""
    with torch.autocast("cpu", torch.bfloat16):
        logits, mtp_logits = model(window[:, :-2], window[:, 1:-1])
    main = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:-1].flatten())
    mtp = F.cross_entropy(mtp_logits.float().flatten(0, 1), window[:, 2:].flatten())
    return main, mtp


def balance(model: TinyMoE) -> None:
    """Move the router bias of experts whose load in this step was far from the mean."""
    for block in model.moe_blocks().values():
        load = block.chosen.flatten().bincount(minlength=block.config.num_experts).float()
        relative = load / load.mean()
        block.router.bias += BIAS_STEP * ((relative < LOAD_LOW).float() - (relative > LOAD_HIGH).float())


def train(
    model: TinyMoE, stream: np.ndarray, *, steps: int, batch: int, seed: int, rate: float
) -> Iterator[dict[str, float]]:
    """Train in place; yield each step's losses in nats a token."""
    batches = windows(stream, model.config.max_context, batch, seed)
    chosen_optimizers = optimizers(model, rate)
    rates = [group["lr"] for optimizer in chosen_optimizers for group in optimizer.param_groups]
    for step in range(steps):
        groups = [group for optimizer in chosen_optimizers for group in optimizer.param_groups]
        for group, first in zip(groups, rates, strict=True):
            group["lr"] = first * (1 - step / steps)
        main, mtp = losses(model, next(batches))
        (main + MTP_LOSS_WEIGHT * mtp).backward()
        for optimizer in chosen_optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        balance(model)
        yield {"step": step, "loss": main.item(), "mtp_loss": mtp.item()}


def run(args: argparse.Namespace) -> None:
    """Train and write weights.safetensors (float32) and losses.jsonl."""
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer.from_file(str(args.data / "tokenizer.json"))
    stream = token_stream(load(args.data / "train.jsonl"), tokenizer)
    model = TinyMoE(Config(eot_token=tokenizer.token_to_id(END_OF_TEXT)))
    if args.start:
        model.load_state_dict(load_file(args.start))
    args.out.mkdir(parents=True, exist_ok=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns) as bar, (args.out / "losses.jsonl").open("w", buffering=1) as log:
        task = bar.add_task("", total=args.steps)
        schedule = {name: getattr(args, name) for name in ("steps", "batch", "seed", "rate")}
        for report in train(model, stream, **schedule):
            log.write(json.dumps(report) + "\n")
            bar.update(task, advance=1, description=f"loss {report['loss']:.3f} mtp {report['mtp_loss']:.3f}")
    save_file(model.state_dict(), args.out / "weights.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="train.jsonl and tokenizer.json")
    parser.add_argument("--out", type=Path, default=Path("run"))
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch", type=int, default=8, help="windows of 256 tokens a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1.0, help="scales the learning rates")
    parser.add_argument("--start", type=Path, help="weights to go on from, instead of random ones")
    args = parser.parse_args()
    # More threads would change the order of sums from machine to machine, and with it the result.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    run(args)


if __name__ == "__main__":
    main()
