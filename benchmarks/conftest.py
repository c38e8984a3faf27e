"""An option of the suites."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """--ranks."""
    parser.addoption("--ranks", type=int, default=2, help="ranks of each benchmark (2)")
