"""Turns a conversation into a prompt that the model can continue."""

from __future__ import annotations

from collections.abc import Sequence

# The model knows plays: who speaks, then the speech, then a blank line.
_SPEAKERS = {"user": "USER.\n", "assistant": "ASSISTANT.\n", "system": "", "developer": ""}

# ends the assistant's speech, as a stop string does
END_OF_TURN = "\n\n"


def render(messages: Sequence[tuple[str, str]]) -> str:
    """The prompt for (role, content) pairs: a scene in which it is the assistant's turn to speak."""
    speeches = [f"{_SPEAKERS[role]}{content.strip()}{END_OF_TURN}" for role, content in messages]
    return "".join(speeches) + _SPEAKERS["assistant"]
