"""Train the tokenizer: byte-level BPE, so that any UTF-8 text can be encoded and decoded back."""

from __future__ import annotations

import argparse
from pathlib import Path

from text import load
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"


def train(texts: list[str]) -> Tokenizer:
    """Train on `texts`; token 0 is end-of-text, tokens 1 to 256 are the bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    """Train on train.jsonl and write tokenizer.json beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    args = parser.parse_args()
    texts = [document.text for document in load(args.data / "train.jsonl")]
    tokenizer = train(texts)
    tokenizer.save(str(args.data / "tokenizer.json"))
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts))
    print(f"{tokenizer.get_vocab_size()} tokens, {sum(map(len, texts)) / tokens:.3f} characters a token")


if __name__ == "__main__":
    main()
