"""Text to tokens and back, with text that grows token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer as _Tokenizer

_REPLACEMENT = "\ufffd"


class Tokenizer:
    """Byte-level BPE read from tokenizer.json; every text begins with the end-of-text token, as in training."""

    def __init__(self, inner: _Tokenizer, eot_token: int) -> None:
        self._inner = inner
        self._eot = eot_token

    @classmethod
    def load(cls, path: Path, eot_token: int) -> Tokenizer:
        """Read a tokenizer.json of the tokenizers library."""
        from tokenizers import Tokenizer as _Tokenizer

        return cls(_Tokenizer.from_file(str(path)), eot_token)

    @property
    def longest_token(self) -> int:
        """Bytes of the longest token: no text has fewer tokens than its length by this."""
        return max(len(token) for token in self._inner.get_vocab())

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a prompt."""
        return (self._eot, *self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; end-of-text tokens give nothing."""
        text: str = self._inner.decode([token for token in tokens if token != self._eot], skip_special_tokens=True)
        return text


class TextStream:
    """Turns tokens that arrive one by one into text, holding back bytes of an incomplete character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Text that becomes complete with this token; may be empty."""
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        if text.endswith(_REPLACEMENT) and len(self._pending) < 4:
            return ""
        self._pending.clear()
        return text

    def flush(self) -> str:
        """Text of what was held back."""
        text = self._tokenizer.decode(self._pending)
        self._pending.clear()
        return text
