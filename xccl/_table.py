"""Tables on the terminal: with rich where it is installed, in plain columns otherwise."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

# What a cell means; rich shows it as colour.
STYLES = {
    "pass": "green",
    "alive": "green",
    "warn": "yellow",
    "stopped": "yellow",
    "fail": "bold red",
    "dead": "bold red",
    "aborted": "bold red",
}


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Prints a title, rows under their columns, and notes below."""
    if importlib.util.find_spec("rich") is None:
        sys.stdout.write(plain_table(title, columns, rows))
        sys.stdout.writelines(note + "\n" for note in notes)
    else:
        _print_rich(title, columns, rows, notes)
    sys.stdout.flush()


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as text, each column as wide as its widest cell."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows)]
    return "\n".join([title, *(line.rstrip() for line in lines)]) + "\n"


def _print_rich(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # What goes into a pipe or file is not cut at the width of a terminal.
    console = Console() if sys.stdout.isatty() else Console(width=240)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    console.print(table)
    for note in notes:
        console.print(Text(note))
