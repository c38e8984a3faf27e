"""Writes the texts of running requests to a terminal or pipe while they are produced."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from xccl.serving.config import ModelConfig
from xccl.serving.exchange import StepReport
from xccl.serving.request import Request
from xccl.serving.running import length_limit
from xccl.serving.tokenizer import TextStream, Tokenizer


class TextPrinter:
    """Shows the first ``shown`` requests in order: one streams live, those after it follow with what they have.

    Interleaving lines of several requests would be unreadable, so a request that is faster than the one on
    display waits for its turn. Call it with each step's report. When the last text is shown, a progress bar tells
    how far the other requests are, if ``console`` is a terminal.
    """

    def __init__(
        self,
        console: Console,
        requests: Sequence[Request],
        prompts: Sequence[str],
        tokenizer: Tokenizer,
        config: ModelConfig,
        shown: int,
    ) -> None:
        self._console = console
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._numbered = len(requests) > 1
        self._queue = [request.request_id for request in requests[:shown]]
        self._unseen: dict[int, list[int]] = {request_id: [] for request_id in self._queue}
        self._stream: TextStream | None = None
        self._bar = TokenBar(console, "serving", requests, config)

    def __call__(self, report: StepReport) -> None:
        """Take in one step."""
        self._bar.count(report)
        for request_id, token in zip(report.request_ids.tolist(), report.tokens.tolist(), strict=True):
            if request_id in self._unseen:
                self._unseen[request_id].append(token)
        while self._queue and self._show(self._queue[0]):
            self._queue.pop(0)
        if not self._queue:
            self._bar.draw()

    def _show(self, request_id: int) -> bool:
        """Write the news of the request on display; True if it has ended."""
        if self._stream is None:
            self._stream = TextStream(self._tokenizer)
            label = f"[{request_id}] " if self._numbered else ""
            self._write(label, "dim")
            self._write(self._prompts[request_id], "bold")
        self._write("".join(self._stream.push(token) for token in self._unseen[request_id]))
        self._unseen[request_id].clear()
        if not self._bar.has_ended(request_id):
            return False
        self._write(self._stream.flush() + "\n\n")
        self._stream = None
        return True

    def _write(self, text: str, style: str | None = None) -> None:
        self._console.out(text, style=style, end="", highlight=False)
        self._console.file.flush()


class TokenBar:
    """A progress bar over tokens; nothing is drawn unless the console is a terminal.

    A request that ends before its limit counts with the tokens it could have had.
    """

    def __init__(self, console: Console, label: str, requests: Sequence[Request], config: ModelConfig) -> None:
        self._eot = config.eot_token
        self._left = {r.request_id: length_limit(r, config.max_context) - len(r.prompt_tokens) for r in requests}
        self._progress = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(label, total=sum(self._left.values()))

    def count(self, report: StepReport) -> None:
        """Take in one step without drawing."""
        for request_id, token in zip(report.request_ids.tolist(), report.tokens.tolist(), strict=True):
            self._left[request_id] = 0 if token == self._eot else self._left[request_id] - 1

    def draw(self) -> None:
        """Show the bar; it goes away when all requests have ended."""
        left = sum(self._left.values())
        self._progress.start()
        self._progress.update(self._task, completed=(self._progress.tasks[0].total or 0) - left)
        if left == 0:
            self._progress.stop()

    def has_ended(self, request_id: int) -> bool:
        """Whether a request has all its tokens."""
        return self._left[request_id] == 0
