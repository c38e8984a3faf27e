"""Measures series of the plan on the ranks of this job; `benchmarks.targets` starts it under each mpirun.

    mpirun -n 2 python -m benchmarks.measure --out rows.json --blocks 8 send-small barrier-2

One start for many series: to start the ranks takes longer than to measure a row.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import xccl
from benchmarks.plan import EVERY
from xccl.bench import runner


def main() -> None:
    """Rank 0 writes the file: the machine, and for each series rows as in `xccl bench --json` with their x."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--short", action="store_true", help="first and last size of each series")
    parser.add_argument("series", nargs="+", choices=EVERY, metavar="SERIES")
    options = parser.parse_args()
    found: dict[str, list[dict[str, object]]] = {}
    with xccl.init() as comm:
        for name in options.series:
            series = EVERY[name].shortened() if options.short else EVERY[name]
            machine, rows = runner.run(comm, replace(series.settings, blocks=options.blocks), silent=True)
            if any(row.wrong for row in rows):
                raise SystemExit(f"{name}: wrong results are no measurement: {[row for row in rows if row.wrong]}")
            found[name] = [asdict(row) | {"x": series.x(row.size, row.count)} for row in rows]
        if comm.rank == 0:
            options.out.write_text(json.dumps({"machine": asdict(machine), "rows": found}))


if __name__ == "__main__":
    main()
