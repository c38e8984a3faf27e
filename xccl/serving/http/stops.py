"""Ends a text that grows piece by piece before the first of its stop strings."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Passes text on until a stop string is complete.

    Text that may be the beginning of a stop string is held back. The stop string that is complete first counts, of
    several that end with the same character the longest; how the text is cut into pieces changes nothing.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take in more text; returns what can be shown. Nothing comes after a stop."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        shown = []
        for character in text:
            self._held += character
            if any(self._held.endswith(stop) for stop in self._stops):
                ended = max((stop for stop in self._stops if self._held.endswith(stop)), key=len)
                self.stopped = True
                shown.append(self._held[: -len(ended)])
                self._held = ""
                break
            keep = self._possible_beginning()
            shown.append(self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]
        return "".join(shown)

    def flush(self) -> str:
        """What was held back, when the text has ended without a stop."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = min(len(self._held), max((len(stop) for stop in self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
