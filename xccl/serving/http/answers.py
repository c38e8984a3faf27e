"""The objects that OpenAI's API answers with."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from xccl.serving.http.generation import Finish, Piece

DONE = b"data: [DONE]\n\n"


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage(num_prompt_tokens: int, num_tokens: int) -> dict[str, int]:
    """Token counts; a prompt counts once, whatever n is."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
    }


class Answer(Protocol):
    """How one endpoint words its answers."""

    def beginning(self, num_choices: int) -> list[dict[str, Any]]:
        """Chunks of a stream before any text."""

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk of a stream."""

    def piece(self, piece: Piece) -> list[dict[str, Any]]:
        """Chunks for a piece of text."""

    def whole(self, texts: Sequence[str], finishes: Sequence[Finish], counts: dict[str, int]) -> dict[str, Any]:
        """The answer in one."""


@dataclass(frozen=True)
class CompletionAnswer:
    """Answers of ``/v1/completions``."""

    model: str
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def beginning(self, num_choices: int) -> list[dict[str, Any]]:
        """Nothing."""
        return []

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A ``text_completion``."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def piece(self, piece: Piece) -> list[dict[str, Any]]:
        """One chunk: text, and the reason with the last."""
        return [self.chunk([self._choice(piece.index, piece.text, piece.finish_reason)])]

    def whole(self, texts: Sequence[str], finishes: Sequence[Finish], counts: dict[str, int]) -> dict[str, Any]:
        """All choices and the token counts."""
        choices = [self._choice(index, *choice) for index, choice in enumerate(zip(texts, finishes, strict=True))]
        return {**self.chunk(choices), "usage": counts}

    @staticmethod
    def _choice(index: int, text: str, finish: Finish | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


@dataclass(frozen=True)
class ChatAnswer:
    """Answers of ``/v1/chat/completions``."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def beginning(self, num_choices: int) -> list[dict[str, Any]]:
        """Who speaks, for every choice."""
        first = {"role": "assistant", "content": ""}
        return [self.chunk([self._delta(index, first, None)]) for index in range(num_choices)]

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A ``chat.completion.chunk``."""
        return self._object("chat.completion.chunk", choices)

    def piece(self, piece: Piece) -> list[dict[str, Any]]:
        """Text, then the reason in a chunk of its own, as OpenAI has it."""
        chunks = []
        if piece.text:
            chunks.append(self.chunk([self._delta(piece.index, {"content": piece.text}, None)]))
        if piece.finish_reason is not None:
            chunks.append(self.chunk([self._delta(piece.index, {}, piece.finish_reason)]))
        return chunks

    def whole(self, texts: Sequence[str], finishes: Sequence[Finish], counts: dict[str, int]) -> dict[str, Any]:
        """All choices and the token counts."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": finish,
            }
            for index, (text, finish) in enumerate(zip(texts, finishes, strict=True))
        ]
        return {**self._object("chat.completion", choices), "usage": counts}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    @staticmethod
    def _delta(index: int, delta: dict[str, Any], finish: Finish | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
