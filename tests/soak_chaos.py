"""Every protocol under XCCL_CHAOS, with as many seeds as one likes.

    python tests/soak_chaos.py --seeds 5000 --first 1000

What fails names its seed; `--first SEED --seeds 1 CASE` then runs that alone. Exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import sys
import time

from chaos_cases import CASES, run_seeds

import xccl

BATCH = 20  # seeds in one world
RANKS = (3, 4, 2, 3, 5)  # of consecutive worlds


def main() -> int:
    """Runs the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}; all without any")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--calm", action="store_true", help="the same programs without chaos")
    parser.add_argument("-x", action="store_true", help="stop at the first failure")
    arguments = parser.parse_args()
    end, failed, start = arguments.first + arguments.seeds, 0, time.monotonic()
    for first in range(arguments.first, end, BATCH):
        for name in arguments.cases:
            seeds = range(first, min(first + BATCH, end))
            try:
                run_seeds(CASES[name], seeds, RANKS[first // BATCH % len(RANKS)], calm=arguments.calm)
            except xccl.XcclError as error:
                failed += 1
                print(f"{name}, seeds {seeds[0]} to {seeds[-1]}: {error}", flush=True)
                if arguments.x:
                    return 1
    took = time.monotonic() - start
    print(f"{arguments.seeds} seeds, {len(arguments.cases)} cases each: {failed} worlds failed, {took:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
