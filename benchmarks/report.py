"""Makes docs/performance.md, its figures and the table of the README from the published results.

python -m benchmarks.report             # or, with the measurement before it: make performance
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from string import Template

from benchmarks import campaign, figures
from benchmarks.figures import size_name
from benchmarks.plan import EVERY, GROWTH, TARGETS, Series
from benchmarks.results import Point, Results
from benchmarks.targets import PUBLISHED, judge, reached_text

ROOT = campaign.ROOT
TEMPLATE = ROOT / "benchmarks" / "performance.md.in"
NOTES = ROOT / "benchmarks" / "results" / "notes.md"
PAGE = ROOT / "docs" / "performance.md"
FIGURES = ROOT / "docs" / "performance"
README = ROOT / "README.md"

# Rows of the README: what they are called, the series and its x.
README_ROWS = [
    ("send, 8 B", "send-small", 8),
    ("send, 8 B, prepared", "send-small-prepared", 8),
    ("put_signal, 8 B, seen by the peer", "put_signal", 8),
    ("send, 1 MiB", "send-large", 1 << 20),
    ("send, 1 MiB symmetric", "send-large-symmetric", 1 << 20),
    ("barrier, 2 ranks", "barrier-2", 0),
    ("barrier, 8 ranks", "barrier-8", 0),
    *(
        (f"all_to_all, {ranks} ranks, {size} a peer", f"all_to_all-{ranks}-{kind}", x)
        for ranks in (2, 8)
        for size, kind, x in (
            ("8 B", "small", 8),
            ("16 KiB", "small", 16 << 10),
            ("1 MiB", "large", 1 << 20),
            ("1 MiB symmetric", "large-symmetric", 1 << 20),
        )
    ),
    *((f"all_reduce, {ranks} ranks, 2 MiB", f"all_reduce-{ranks}", 2 << 20) for ranks in (2, 8)),
    *((f"dispatch + combine, {ranks} ranks, 128 tokens", f"moe-{ranks}", 128) for ranks in (2, 8)),
    *((f"the same against MPI's bytes only, {ranks} ranks", f"moe-{ranks}-packed", 128) for ranks in (2, 8)),
]


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [titles, ["---"] + ["--:"] * (len(titles) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def targets(results: Results) -> str:
    """The table of targets."""
    rows = []
    for target in TARGETS:
        verdict = judge(target, results)
        if verdict is not None:
            worst = "" if verdict.worst is None else _place(verdict.worst)
            met = "yes" if verdict.met else "**no**"
            rows.append([target.row, target.goal, reached_text(verdict), met, verdict.best, worst])
    return table(["row", "target", "reached", "met", "fastest MPI, at sizes", "worst size: xccl / MPI"], rows)


def _place(point: Point) -> str:
    size = x_name(EVERY[point.series], point.x)
    return f"{size + ': ' if size else ''}{time_name(point.time)} / {time_name(point.mpi_time)}"


def x_name(series: Series, x: int) -> str:
    """Where a row stands, for readers."""
    if series.settings.operation == "barrier":
        return ""
    if series.unit == "tokens":
        return f"{x} tokens"
    return size_name(x) + series.unit.removeprefix("B")


def time_name(microseconds: float) -> str:
    """Three digits, without an exponent."""
    return f"{float(f'{microseconds:.3g}'):g}" if microseconds < 1e6 else f"{microseconds:.0f}"


def details(results: Results) -> str:
    """Every size, a table for each series."""
    parts = []
    for name, series in EVERY.items():
        points = results.of(name)
        if points:
            parts.append(f"### {name}\n\n`{series.command}`\n\n{_details_of(results, series, points)}")
    return "\n\n".join(parts)


def _details_of(results: Results, series: Series, points: dict[int, list[Point]]) -> str:
    best, rows = results.best(series.name), []
    mpis = {mpi: label for mpi, label in results.mpis.items() if any(p.mpi == mpi for p in next(iter(points.values())))}
    for x, every in points.items():
        theirs = {point.mpi: time_name(point.mpi_time) for point in every if point.theirs}
        ours = time_name(statistics.median(point.time for point in every))
        ratio = [f"{best[x].ratio:.2f}"] if mpis else []
        floor = f"{statistics.median(point.of_floor for point in every):.2f}"
        rows.append([x_name(series, x) or "-", ours, *(theirs[mpi] for mpi in mpis), *ratio, floor])
    return table(["size", "xccl µs", *mpis.values(), *(["ratio"] if mpis else []), "floor / xccl"], rows)


def about(results: Results) -> str:
    """Machine, versions, and how often."""
    given = results.about
    commit = f" at commit {given['commit']}" if given["commit"] else ""
    return (
        f"Measured on {given['date']}{commit}: {given['host']}, {given['cores']} cores; {given['versions']}; "
        f"{', '.join(results.mpis.values())}. Medians of {given['blocks']} blocks in each of {given['repeats']} starts "
        "under each MPI. 2 ranks are pinned to a core each; more ranks than cores share them."
    )


def between(results: Results, *series: str) -> str:
    """The range of ratios in series, as "0.4 to 0.9"."""
    found = [point.ratio for name in series for point in results.best(name).values()]
    return f"{min(found):.2f} to {max(found):.2f}" if found else "-"


def growth(results: Results, operation: str) -> str:
    """ "2: 0.5, 4: 3, ...", xccl's times by the number of ranks, without MPI."""
    parts = []
    for series in GROWTH.values():
        if series.settings.operation == operation and series.settings.versus is None:
            times = [point.time for points in results.of(series.name).values() for point in points]
            parts += [f"{series.ranks}: {time_name(times[0])}"] if times else []
    return ", ".join(parts)


def put_signal(results: Results) -> str:
    """What a signal that is seen costs, against MPI's, and against a Put that nobody sees."""
    signal, put = results.best("put_signal").get(8), results.best("put").get(8)
    if signal is None or put is None:
        return "-"
    return (
        f"{time_name(signal.time)} µs in xccl and {time_name(signal.mpi_time)} µs in {campaign.LABELS[signal.mpi]}. "
        f"Put and Flush of the data alone, of which the peer learns nothing, take {time_name(put.mpi_time)} µs in "
        f"{campaign.LABELS[put.mpi]}"
    )


def sentences(results: Results) -> dict[str, str]:
    """The parts of the page that hold figures."""
    send = between(results, "send-small"), between(results, "send-large"), between(results, "send-large-symmetric")
    exchange = {n: between(results, f"all_to_all-{n}-small", f"all_to_all-{n}-large") for n in (2, 8)}
    symmetric = {n: between(results, f"all_to_all-{n}-large-symmetric") for n in (2, 8)}
    moe = [f"moe-{ranks}" for ranks in (2, 4, 8)]
    line = [p.floor for every in results.of("barrier-2").values() for p in every]
    return {
        "about": about(results),
        "targets": targets(results),
        "send": f"Ratios: small messages {send[0]}, large ones {send[1]}, between symmetric arrays {send[2]}.",
        "put_signal": put_signal(results),
        "all_to_all": (
            f"Ratios on 2 ranks: {exchange[2]}, symmetric arrays {symmetric[2]}. On 8 ranks: {exchange[8]}, "
            f"symmetric arrays {symmetric[8]}."
        ),
        "moe": (
            f"xccl takes {between(results, *moe)} of the time of the former and "
            f"{between(results, *(f'{name}-packed' for name in moe))} of that of the latter."
        ),
        "ranks": (
            f"xccl's times in µs by the number of ranks: barrier {growth(results, 'barrier')}; all_to_all of 8 bytes "
            f"to each peer {growth(results, 'all_to_all')}; dispatch of one token {growth(results, 'dispatch')}."
        ),
        "line": f"{min(min(floor) for floor in line):.2g}" if line else "-",
        "idle": f"{100 * statistics.median(results.idle):.2g} %" if results.idle else "-",
        "notes": NOTES.read_text() + "\n" if NOTES.exists() else "",
        "details": details(results),
    }


def readme_table(results: Results) -> str:
    """The README's rows: both times from the processes of the MPI that was fastest."""
    rows = []
    for name, series, x in README_ROWS:
        point = results.best(series).get(x)
        if point is not None:
            mpi = campaign.LABELS[point.mpi]
            rows.append([name, time_name(point.time), time_name(point.mpi_time), f"{point.ratio:.2f}", mpi])
    return about(results) + "\n\n" + table(["operation", "xccl µs", "MPI µs", "ratio", "fastest MPI"], rows)


def write_readme(text: str, content: str) -> str:
    """The README with `content` between its two marks."""
    marks = re.compile(r"(<!-- measured: made by benchmarks/report.py -->\n).*?(<!-- /measured -->)", re.S)
    new, count = marks.subn(lambda match: match[1] + content + "\n" + match[2], text)
    if count != 1:
        raise SystemExit("README.md: one pair of marks is needed, <!-- measured: ... --> and <!-- /measured -->")
    return new


def write(results: Results, page: Path, folder: Path) -> None:
    """The page and its figures."""
    page.write_text(Template(TEMPLATE.read_text()).substitute(sentences(results)).rstrip() + "\n")
    for name, draw in figures.FIGURES.items():
        draw(results, folder / f"{name}.png")


def main() -> None:
    """The command."""
    results = Results.load(PUBLISHED)
    write(results, PAGE, FIGURES)
    README.write_text(write_readme(README.read_text(), readme_table(results)))


if __name__ == "__main__":
    main()
