"""The command `xccl`."""

from __future__ import annotations

import argparse
import sys

import xccl
from xccl import cli_bench, cli_doctor, cli_gc, cli_ps, cli_run, cli_serve


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="xccl",
        description="Shared-memory communication for the ranks of one machine.",
    )
    parser.add_argument("--version", action="version", version=f"xccl {xccl.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    cli_run.add_parser(subparsers)
    cli_serve.add_parser(subparsers)
    cli_bench.add_parser(subparsers)
    cli_doctor.add_parser(subparsers)
    cli_ps.add_parser(subparsers)
    cli_gc.add_parser(subparsers)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code. 2: the command line is wrong."""
    options = build_parser().parse_args(arguments)
    try:
        return int(options.main(options))
    except xccl.XcclUsageError as error:
        sys.stderr.write(f"xccl: {error}\n")
        return 2
    except (xccl.XcclError, FileNotFoundError, PermissionError) as error:
        sys.stderr.write(f"xccl: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
