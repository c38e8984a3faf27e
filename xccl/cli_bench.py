"""`xccl bench`: measures an operation, checked, with floors and MPI beside it."""

from __future__ import annotations

import argparse
import json
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xccl
from xccl.bench import plot, runner
from xccl.bench.libraries import LIBRARIES
from xccl.bench.machine import Machine
from xccl.bench.operations import OPERATIONS
from xccl.bench.row import Row
from xccl.bench.settings import DTYPES, Settings, parse_size
from xccl.bench.workload import SHAPES, WORKLOADS
from xccl.bootstrap import launcher
from xccl.errors import XcclUsageError
from xccl.launcher import check_nranks

_DEFAULT_RANKS = 2

_EPILOG = """\
Every row is checked: if anything arrived wrong, #wrong says how much and the exit code is 1.
Against MPI:   mpirun -n 4 python -m xccl.bench all_to_all --vs mpi
Against gloo:  xccl bench all_to_all -n 4 --vs gloo
"""


def add_parser(subparsers: Any) -> None:
    """Adds the command to the parser of `xccl`."""
    parser = subparsers.add_parser(
        "bench",
        help="measure an operation",
        description="Measures an operation over a range of sizes, checks the results, and says how far from the "
        "machine's floor the times are.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Settings("")
    parser.add_argument("operation", metavar="OP", choices=OPERATIONS, help=", ".join(OPERATIONS))
    parser.add_argument("-n", "--ranks", type=int, metavar="N", help=f"ranks to start (default {_DEFAULT_RANKS})")
    parser.add_argument("-b", "--begin", type=_size, default=default.begin, metavar="SIZE", help="first size (8)")
    parser.add_argument("-e", "--end", type=_size, default=default.end, metavar="SIZE", help="last size (8M)")
    parser.add_argument("-f", "--factor", type=int, default=default.factor, metavar="F", help="size to size (4)")
    parser.add_argument("-w", "--warmup", type=int, default=default.warmup, metavar="W", help="calls before (5)")
    parser.add_argument("-i", "--iterations", type=int, metavar="I", help="calls in a block (default: 10 ms of them)")
    parser.add_argument("--blocks", type=int, default=default.blocks, metavar="B", help="blocks that are timed (20)")
    parser.add_argument("--buffers", type=int, default=default.buffers, metavar="K", help="sets of arrays in turn (2)")
    parser.add_argument("--dtype", choices=DTYPES, metavar="TYPE", help=", ".join(DTYPES))
    moe = parser.add_argument_group("dispatch, combine, moe")
    moe.add_argument("--workload", choices=WORKLOADS, default=default.workload, help="which experts tokens choose")
    moe.add_argument("--shape", choices=SHAPES, default=default.shape, help="hidden size, top-k, experts")
    moe.add_argument(
        "--tokens", type=_numbers, default=default.tokens, metavar="T,T,...", help="of a rank (1,8,32,128)"
    )
    moe.add_argument("--seed", type=int, default=default.seed, help="of tokens and routing (0)")
    pin = parser.add_mutually_exclusive_group()
    pin.add_argument("--pin", action="store_true", default=None, help="a core for each rank (if there are enough)")
    pin.add_argument("--no-pin", action="store_false", dest="pin", help="leave the ranks to the scheduler")
    arrays = parser.add_mutually_exclusive_group()
    arrays.add_argument("--symmetric", action="store_true", help="arrays in the global address space")
    arrays.add_argument("--ordinary", action="store_false", dest="symmetric", help="NumPy arrays (default)")
    parser.add_argument("--prepared", action="store_true", help="calls made by comm.prepare")
    parser.add_argument(
        "--vs",
        dest="versus",
        choices=LIBRARIES,
        help="the same by mpi4py or torch.distributed, in turns, and the ratio",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, machine and rows")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw time and bandwidth against size")
    parser.set_defaults(main=main)


def main(options: argparse.Namespace) -> int:
    """Measures; returns the exit code: 0, or 1 if a result was wrong."""
    settings = Settings(**{name: getattr(options, name) for name in Settings.__dataclass_fields__})
    if options.plot is not None:
        plot.require()
    started_by = launcher()
    ranks = _DEFAULT_RANKS if options.ranks is None else options.ranks
    library = None if settings.versus is None else LIBRARIES[settings.versus]
    if library is not None and library.needs_mpirun and started_by != "mpirun":
        raise XcclUsageError(
            f"bench: --vs {settings.versus} needs ranks that mpirun started{_but(started_by)}: "
            f"mpirun -n {ranks} python -m xccl.bench {settings.operation} --vs {settings.versus}"
        )
    if started_by is None:
        machine, rows = _start_ranks(settings, ranks)
    else:
        with xccl.init() as comm:
            machine, rows = _take_part(comm, settings, options.ranks)
            if comm.rank != 0:
                options.json = options.plot = None  # rank 0 writes the files
    if options.json is not None:
        _write_json(options.json, settings, machine, rows)
    if options.plot is not None:
        plot.draw(options.plot, machine, rows, None if library is None else library.label)
    return 1 if any(row.wrong for row in rows) else 0


def _start_ranks(settings: Settings, ranks: int) -> tuple[Machine, list[Row]]:
    check_nranks(ranks)
    runner.find(settings, ranks)
    result: tuple[Machine, list[Row]] = xccl.run(runner.run, ranks, settings)[0]
    return result


def _take_part(comm: xccl.Communicator, settings: Settings, ranks: int | None) -> tuple[Machine, list[Row]]:
    """Measures as a rank that a launcher started. What goes wrong here ends the other ranks too."""
    if ranks is not None and ranks != comm.size:
        raise XcclUsageError(f"bench: -n {ranks}, but the launcher started {comm.size} ranks: leave out -n")
    runner.find(settings, comm.size)
    try:
        return runner.run(comm, settings)
    except BaseException:
        comm.abort(traceback.format_exc())
        raise


def _but(started_by: str | None) -> str:
    return "" if started_by is None else f", not {started_by}"


def _write_json(path: Path, settings: Settings, machine: Machine, rows: list[Row]) -> None:
    derived = [{"algbw": row.algbw, "busbw": row.busbw, "ratio": row.ratio} for row in rows]
    content = {
        "settings": asdict(settings),
        "machine": asdict(machine),
        "rows": [asdict(row) | more for row, more in zip(rows, derived, strict=True)],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers with commas between them, such as 8,32; got {text!r}") from None


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
