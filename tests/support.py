"""Decorator that runs a test function on several ranks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import xccl


def ranks(
    *counts: int, timeout: float = 60.0, keep_going: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Runs `test(comm, ...)` on each number of ranks given; further arguments are pytest's.

    With `keep_going` ranks may die. A failing test shows each rank's output. More ranks than cores is normal.
    """

    def decorate(test: Callable[..., Any]) -> Callable[..., None]:
        parameters = list(inspect.signature(test).parameters.values())[1:]

        @functools.wraps(test)
        def run_on_ranks(nranks: int, tmp_path: Path, **arguments: Any) -> None:
            if "tmp_path" in {p.name for p in parameters}:
                arguments["tmp_path"] = tmp_path
            try:
                xccl.run(
                    lambda comm: test(comm, **arguments), nranks, timeout=timeout, logs=tmp_path, keep_going=keep_going
                )
            except xccl.XcclError as error:
                logs = "\n".join(f"--- {log.name}\n{log.read_text()}" for log in sorted(tmp_path.glob("rank-*.log")))
                pytest.fail(f"{type(error).__name__}: {error}\n{logs}", pytrace=False)

        own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("nranks", "tmp_path")]
        pytest_parameters = [p for p in parameters if p.name != "tmp_path"]
        run_on_ranks.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [*own, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in pytest_parameters)]
        )
        return pytest.mark.parametrize("nranks", counts)(run_on_ranks)

    return decorate
