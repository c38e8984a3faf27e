"""Measure the exported model on held-out text: the figures of the model card."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from export import load_exported
from model import TinyMoE
from rich.console import Console
from rich.table import Table
from text import Document, load
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from train import token_stream

BATCH = 16


@dataclass
class Tally:
    """Sums over one text; `+` joins two texts."""

    nats: float = 0.0
    tokens: int = 0
    characters: int = 0
    agreed: int = 0
    drafts: int = 0
    # Choices of each expert [experts] by block, and hottest/mean of each group of 16 tokens decoded together.
    load: dict[str, Tensor] = field(default_factory=dict)
    step_skew: list[Tensor] = field(default_factory=list)

    def __add__(self, other: Tally) -> Tally:
        load = {name: count + other.load[name] for name, count in self.load.items()}
        sums = (getattr(self, name) + getattr(other, name) for name in ("nats", "tokens", "characters"))
        agreed, drafts = self.agreed + other.agreed, self.drafts + other.drafts
        return Tally(*sums, agreed, drafts, load, self.step_skew + other.step_skew)


def cut(stream: Tensor, length: int) -> Iterator[Tensor]:
    """Yield batches [B, length + 1] of windows that share one token, so that each is predicted once."""
    full = (len(stream) - 1) // length
    rows = stream[: full * length + 1].unfold(0, length + 1, length)
    yield from rows.split(BATCH)
    if (len(stream) - 1) % length > 1:
        yield stream[full * length :][None]


@torch.no_grad()
def measure(model: TinyMoE, stream: np.ndarray, characters: int) -> Tally:
    """Run the model teacher-forced over one text, without context across windows."""
    tally = Tally(characters=characters)
    experts = model.config.num_experts
    for window in cut(torch.from_numpy(stream), model.config.max_context):
        logits, mtp_logits = model(window[:, :-1], window[:, 1:])
        tally.nats += F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum").item()
        tally.tokens += window[:, 1:].numel()
        # MTP at i and the model at i + 1 predict the same token.
        same = mtp_logits[:, :-1].argmax(-1) == logits[:, 1:].argmax(-1)
        tally.agreed += int(same.sum())
        tally.drafts += same.numel()
        for name, block in model.moe_blocks().items():
            one_hot = F.one_hot(block.chosen, experts).sum(2).float()
            tally.load[name] = tally.load.get(name, 0) + one_hot.sum((0, 1))
            if len(window) == BATCH:
                steps = one_hot.sum(0)
                tally.step_skew.append(steps.amax(-1) / steps.mean(-1))
    return tally


@torch.no_grad()
def sampled_acceptance(model: TinyMoE, stream: np.ndarray, temperature: float, seed: int) -> float:
    """Share of MTP's drafts that equal the token sampled, when both use the same Gumbel noise.

    32 prompts of 32 held-out tokens are continued by 96 tokens each.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.from_numpy(stream[: 32 * 512].reshape(32, 512)[:, :32])
    accepted = []
    for _ in range(96):
        # The last column's next token does not exist yet; MTP is read one column before it.
        logits, mtp_logits = model(tokens, F.pad(tokens[:, 1:], (0, 1)))
        uniform = torch.rand(logits[:, -1].shape, generator=generator).clamp(1e-20, 1 - 1e-7)
        noise = -(-uniform.log()).log()
        sampled = (logits[:, -1] / temperature + noise).argmax(-1)
        draft = (mtp_logits[:, -2] / temperature + noise).argmax(-1)
        accepted.append((draft == sampled).float().mean().item())
        tokens = torch.cat((tokens, sampled[:, None]), 1)
    return sum(accepted) / len(accepted)


def figures(tally: Tally) -> dict[str, float]:
    """The figures of one text; loads as multiples of the mean load."""
    relative = [count / count.mean() for count in tally.load.values()]
    hottest = [r.max().item() for r in relative]
    return {
        "bits_per_character": tally.nats / math.log(2) / tally.characters,
        "nats_per_token": tally.nats / tally.tokens,
        "mtp_agreement": tally.agreed / tally.drafts,
        "hottest_expert_lowest_layer": min(hottest),
        "hottest_expert_highest_layer": max(hottest),
        "coldest_expert": min(r.min().item() for r in relative),
        "hottest_expert_16_tokens": torch.cat(tally.step_skew).mean().item(),
    }


def evaluate(model: TinyMoE, tokenizer: Tokenizer, heldout: Path) -> dict[str, dict[str, float]]:
    """Figures for each domain and for all held-out text."""
    documents: dict[str, list[Document]] = {}
    for document in load(heldout):
        documents.setdefault(document.domain, []).append(document)
    tallies, streams = {}, []
    for domain, chosen in documents.items():
        streams.append(token_stream(chosen, tokenizer))
        tallies[domain] = measure(model, streams[-1], sum(len(d.text) for d in chosen))
    first, *others = tallies.values()
    results = {"all": figures(sum(others, first))} | {name: figures(tally) for name, tally in tallies.items()}
    results["all"]["mtp_sampled_acceptance"] = sampled_acceptance(model, np.concatenate(streams), 0.7, seed=0)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("../../xccl/serving/model"))
    parser.add_argument("--data", type=Path, default=Path("data"), help="heldout.jsonl")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_exported(args.model)
    results = evaluate(model, tokenizer, args.data / "heldout.jsonl")
    table = Table("figure", *results, title="held-out text, exported float16 weights")
    for name in results["all"]:
        table.add_row(name, *(f"{r[name]:.3f}" if name in r else "" for r in results.values()))
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
