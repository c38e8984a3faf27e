"""`xccl ps`: what every rank does, seen from outside."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import Any

from xccl._table import print_table
from xccl.sessions import RankState, Session, held_up_by, look, rates

COLUMNS = ("rank", "pid", "state", "operation", "sequence", "phase", "waits for", "last began", "operations/s")


def add_parser(subparsers: Any) -> None:
    """Adds the command to the parser of `xccl`."""
    parser = subparsers.add_parser(
        "ps",
        help="show what every rank does",
        description="Shows every session of this user: each rank's operation, whom it waits for, and its rate. It "
        "reads from outside, also when the ranks hang, and needs no right to trace.",
    )
    parser.add_argument("session", nargs="?", default="", metavar="SESSION", help="begin of a session id; default: all")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a session, in a list")
    parser.add_argument("--watch", action="store_true", help="go on until Ctrl-C")
    parser.add_argument(
        "--interval", type=_seconds, default=0.5, metavar="S", help="seconds between two looks, for rates (0.5)"
    )
    parser.set_defaults(main=main)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 3600:
        raise argparse.ArgumentTypeError(f"seconds between 0 and 3600, got {text}")
    return seconds


def main(options: argparse.Namespace) -> int:
    """Shows the sessions; exit code 1 if SESSION is not there."""
    try:
        before = look(options.session)
        while True:
            time.sleep(options.interval)
            after = look(options.session)
            _show(before, after, options)
            before = after
            if not options.watch:
                break
    except KeyboardInterrupt:
        return 0
    return 1 if options.session and not after else 0


def _show(before: list[Session], after: list[Session], options: argparse.Namespace) -> None:
    if options.watch and sys.stdout.isatty() and not options.json:
        sys.stdout.write("\x1b[H\x1b[2J")  # cursor home, clear
    earlier = {session.session: session for session in before}
    pairs = [(session, rates(earlier.get(session.session, session), session)) for session in after]
    if options.json:
        sys.stdout.write(json.dumps([as_json(session, speeds) for session, speeds in pairs]) + "\n")
        sys.stdout.flush()
        return
    if not pairs:
        what = f"session that begins with {options.session}" if options.session else "session of this user"
        sys.stderr.write(f"xccl ps: no {what} runs\n")
    for session, speeds in pairs:
        rows = [_row(rank, speed) for rank, speed in zip(session.ranks, speeds, strict=True)]
        print_table(_title(session), COLUMNS, rows, [note] if (note := explanation(session)) else [])


def as_json(session: Session, speeds: list[float]) -> dict[str, Any]:
    """The session's fields, with `operations_per_s` for each rank and who holds up how many."""
    record = asdict(session)
    del record["taken"]
    for rank, speed in zip(record["ranks"], speeds, strict=True):
        rank["operations_per_s"] = round(speed, 3)
    record["held_up_by"] = {str(rank): count for rank, count in held_up_by(session).items()}
    return record


def explanation(session: Session) -> str:
    """One line on who holds up the others; empty if nobody waits."""
    blame = held_up_by(session)
    if not blame:
        return ""
    states = {rank.rank: rank for rank in session.ranks}
    if any(states[rank].waits_for is not None for rank in blame if rank in states):
        circle = [f"{rank} ({states[rank].operation})" for rank in sorted(blame)]
        return f"ranks {', '.join(circle)} wait for each other"
    return "; ".join(_blame(states[rank], count) for rank, count in sorted(blame.items()))


def _blame(rank: RankState, count: int) -> str:
    others = "1 rank waits" if count == 1 else f"{count} ranks wait"
    if rank.state != "alive":
        return f"{others} for rank {rank.rank}, which is {rank.state}"
    return f"{others} for rank {rank.rank}, at operation {rank.sequence} ({rank.operation}), which waits for nobody"


def _title(session: Session) -> str:
    ranks = "1 rank" if session.size == 1 else f"{session.size} ranks"
    aborted = ", aborted" if session.aborted else ""
    return f"session {session.session}: {ranks}, started {_ago(session.age_s)} by pid {session.creator_pid}{aborted}"


def _row(rank: RankState, speed: float) -> list[str]:
    if rank.state == "absent":
        return [str(rank.rank), "-", rank.state, *["-"] * (len(COLUMNS) - 3)]
    waits = "-" if rank.waits_for is None else f"rank {rank.waits_for}"
    numbers = [str(rank.sequence), str(rank.phase)]
    return [
        str(rank.rank),
        str(rank.pid),
        rank.state,
        rank.operation,
        *numbers,
        waits,
        _ago(rank.moved_s),
        f"{speed:.1f}",
    ]


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.1f} h ago"
