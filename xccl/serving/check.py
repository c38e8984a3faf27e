"""Compares the texts of a run with those of the single-process reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xccl.serving.request import RequestOutput


@dataclass(frozen=True)
class Difference:
    """First token in which a request differs; None stands for a text that has ended."""

    request_id: int
    index: int
    got: int | None
    expected: int | None


def first_difference(got: Sequence[RequestOutput], expected: Sequence[RequestOutput]) -> Difference | None:
    """First difference in order of request id, or None if all tokens are the same.

    Raises ValueError if the two runs did not serve the same requests.
    """
    mine = {output.request_id: output.tokens for output in got}
    theirs = {output.request_id: output.tokens for output in expected}
    if mine.keys() != theirs.keys():
        raise ValueError(f"runs of different requests: {sorted(mine.keys() ^ theirs.keys())} are in one of them only")
    for request_id in sorted(mine):
        a, b = mine[request_id], theirs[request_id]
        if a != b:
            same = 0
            while same < min(len(a), len(b)) and a[same] == b[same]:
                same += 1
            return Difference(request_id, same, _at(a, same), _at(b, same))
    return None


def _at(tokens: Sequence[int], index: int) -> int | None:
    return tokens[index] if index < len(tokens) else None
