"""A bounded share of `make soak`: SIGKILL at random moments leaves nothing."""

from __future__ import annotations

import pytest
from soak_kill import kill_once


@pytest.mark.parametrize("seed", range(10))
def test_a_kill_at_any_moment_leaves_nothing(seed: int) -> None:
    outcome = kill_once(seed)
    assert not outcome.problem, outcome
