"""Where prompts come from, and the requests made of them."""

from __future__ import annotations

import os
import select
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from xccl.serving.config import ModelConfig
from xccl.serving.request import Request, SamplingParams
from xccl.serving.tokenizer import Tokenizer

# in the form of the training text: a chapter's or scene's heading, then its beginning
BUILT_IN = (
    "Genesis 51\n\n1 And it came to pass in the days of",
    "SCENE 1. A street in London\n\n[Enter HAMLET and FALSTAFF.]\n\nHAMLET.\n",
    "Psalms 151\n\n1 O sing unto the LORD, for",
    "ROMEO.\nBut soft, what light",
)

# a pipe that nobody writes to must not stop the command for ever
_STDIN_WAIT_SECONDS = 2.0


class PromptError(ValueError):
    """A prompt that cannot be served; the message says which and why."""


def collect_prompts(given: Sequence[str], file: str | None, stdin: TextIO) -> list[str]:
    """Prompts of the command line, then the lines of ``file`` ("-": standard input).

    Without either: the lines of standard input if it is a pipe or file with content, else the built-in prompts.
    Raises PromptError for an empty prompt, a file without prompts, or one that cannot be read.
    """
    for number, prompt in enumerate(given):
        if not prompt.strip():
            raise PromptError(f"prompt {number} is empty: give some text to continue")
    prompts = list(given)
    if file == "-":
        prompts += _lines(stdin.read(), "standard input")
    elif file is not None:
        try:
            prompts += _lines(Path(file).read_text(encoding="utf-8"), file)
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(f"cannot read prompts from {file}: {error}") from error
    elif not prompts and _has_input(stdin):
        text = stdin.read()
        prompts = _lines(text, "standard input") if text else []
    return prompts or list(BUILT_IN)


def make_requests(
    prompts: Sequence[str], count: int | None, sampling: SamplingParams, tokenizer: Tokenizer, config: ModelConfig
) -> list[Request]:
    """``count`` requests that repeat the prompts in turn (None: one a prompt).

    Raises PromptError for a prompt that does not fit the model's context.
    """
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    for number, tokens in enumerate(encoded):
        if len(tokens) >= config.max_context:
            raise PromptError(
                f"prompt {number} is too long: {len(tokens)} tokens, the model takes at most "
                f"{config.max_context - 1} (its context of {config.max_context} less one to generate)"
            )
    total = len(prompts) if count is None else count
    return [Request(i, encoded[i % len(prompts)], sampling) for i in range(total)]


def _lines(text: str, source: str) -> list[str]:
    """The lines that hold text; blank lines only separate."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise PromptError(f"{source} holds no prompt: one a line is expected")
    return lines


def _has_input(stdin: TextIO) -> bool:
    """Whether standard input is a file, or a pipe that has data or is closed within a short time."""
    try:
        mode = os.fstat(stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    if stat.S_ISREG(mode):
        return True
    return stat.S_ISFIFO(mode) and bool(select.select([stdin], [], [], _STDIN_WAIT_SECONDS)[0])
