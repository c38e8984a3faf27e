"""The pytest fixture `inject_faults`. In a conftest.py: `pytest_plugins = ["xccl.pytest_plugin"]`.

def test_survivors_go_on(inject_faults):
    inject_faults([{"rank": 1, "operation": "dispatch", "action": "kill"}])
    results = xccl.run(serve, 4, keep_going=True, timeout=30)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest

from xccl import faults


@pytest.fixture
def inject_faults(request: pytest.FixtureRequest) -> Iterator[Callable[..., tuple[faults.Fault, ...]]]:
    """Puts a plan of faults in force until the test ends: `inject_faults(plan)`, see `xccl.faults.inject`.

    Gives the plan as a tuple of Fault. When the test fails its report shows the plan as JSON.
    """
    with contextlib.ExitStack() as stack:

        def inject(plan: str | os.PathLike[str] | faults.Plan) -> tuple[faults.Fault, ...]:
            injected = stack.enter_context(faults.inject(plan))
            request.node.add_report_section("call", "injected faults", faults.dump(injected))
            return injected

        yield inject
