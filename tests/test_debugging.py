"""docs/debugging.md: the hang that it shows hangs, and the first message alone explains it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "debugging.md"


def test_the_first_message_of_the_hang_names_who_is_missing(tmp_path: Path) -> None:
    found = re.search(r"^```py\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert found
    program = tmp_path / "steps.py"
    program.write_text(found[1])
    done = subprocess.run(
        [sys.executable, "-m", "xccl", "run", "-n", "4", "--timeout", "60", str(program)],
        env=os.environ | {"XCCL_TIMEOUT": "2"},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 1
    first = done.stderr[done.stderr.index("XcclTimeout") :]
    # The ranks that wait for rank 2, or rank 2 that waits for all: whose deadline comes first.
    waiting = r"rank [013]: dispatch timed out\.\n  missing: dispatch: .* of rank 2, expected"
    assert re.search(waiting + r"|rank 2: barrier timed out\.\n  missing: ", first), first
    operations = dict(re.findall(r"rank (\d) \(pid \d+, alive\): operation (\d+ \(\w+\))", first))
    behind, others = operations.pop("2"), set(operations.values())
    assert behind.endswith("(barrier)")
    assert len(others) == 1
    assert int(behind.split()[0]) < int(others.pop().split()[0])
