"""`xccl doctor`: is this machine ready, and if not, what is to be done?"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

import xccl
from xccl._table import print_table
from xccl.doctor import FAIL, WARN, examine


def add_parser(subparsers: Any) -> None:
    """Adds the command to the parser of `xccl`."""
    parser = subparsers.add_parser(
        "doctor",
        help="check what xccl needs of this machine",
        description="Checks each thing that xccl needs, and says what to change. Exit code 1 if it cannot work here.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON: a finding for each check")
    parser.set_defaults(main=main)


def main(options: argparse.Namespace) -> int:
    """Prints the findings; exit code 1 if one is "fail"."""
    findings = examine()
    if options.json:
        sys.stdout.write(json.dumps({name: asdict(finding) for name, finding in findings.items()}, indent=1) + "\n")
    else:
        rows = [[finding.status, name, finding.why] for name, finding in findings.items()]
        todo = [f"{name}: {finding.todo}" for name, finding in findings.items() if finding.todo]
        counts = {status: sum(f.status == status for f in findings.values()) for status in (FAIL, WARN)}
        verdict = "xccl cannot work here" if counts[FAIL] else "xccl works here"
        notes = [*(["", "To do:"] if todo else []), *(f"  {line}" for line in todo), "", f"{verdict}."]
        print_table(f"xccl {xccl.__version__}", ("", "check", "found"), rows, notes)
    return 1 if any(finding.status == FAIL for finding in findings.values()) else 0
