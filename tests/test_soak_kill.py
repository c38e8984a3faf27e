"""A bounded share of `make soak`: SIGKILL at random moments leaves nothing."""

from __future__ import annotations

import pytest
from soak_kill import kill_once


# Every way to start, early and late, and launchers, shells and ranks as victims.
@pytest.mark.parametrize("seed", [1, 2, 3, 5, 7, 9, 10, 12, 14, 16])
def test_a_kill_at_any_moment_leaves_nothing(seed: int) -> None:
    outcome = kill_once(seed)
    assert not outcome.problem, outcome
