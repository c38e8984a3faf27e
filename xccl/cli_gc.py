"""`xccl gc`: removes what dead sessions left."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from xccl._object import leftovers, shm_directory, sweep


def add_parser(subparsers: Any) -> None:
    """Adds the command to the parser of `xccl`."""
    parser = subparsers.add_parser(
        "gc",
        help="remove what dead sessions left",
        description="Removes shared objects whose creators have died, as every start does. What a living process holds "
        "stays. Without a directory: XCCL_SHM_DIR and /dev/shm.",
    )
    parser.add_argument("directory", nargs="*", type=Path, metavar="DIRECTORY", help="where to look")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    parser.set_defaults(main=main)


def main(options: argparse.Namespace) -> int:
    """Sweeps the directories; prints one line for each object removed."""
    directories = options.directory or sorted({shm_directory(), Path("/dev/shm")})
    found = leftovers if options.dry_run else sweep
    paths = [path for directory in directories for path in found(directory)]
    verb = "would remove" if options.dry_run else "removed"
    sys.stdout.writelines(f"{verb} {path}\n" for path in paths)
    if not paths:
        sys.stdout.write(f"nothing left by dead sessions in {', '.join(map(str, directories))}\n")
    return 0
