"""Draws the results: times, bandwidths and ratios against size, tokens and ranks."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from PIL import Image

from benchmarks.plan import GROWTH
from benchmarks.results import ALONE, Point, Results

Line = tuple[list[int], list[float]]

# The same in every figure. Colours that differ also in lightness, and markers, for readers who see no colours.
_XCCL: dict[str, Any] = {"color": "#0b5fa5", "marker": "o", "linewidth": 2.2}
_SYMMETRIC: dict[str, Any] = _XCCL | {"marker": "s", "linestyle": "--", "color": "#3d9be9"}
_PREPARED: dict[str, Any] = _XCCL | {"marker": "D", "linestyle": ":", "color": "#072f52"}
_MPIS: dict[str, dict[str, Any]] = {
    "openmpi": {"color": "#e07b00", "marker": "^"},
    "mpich": {"color": "#8a8a8a", "marker": "v"},
    "impi-rt": {"color": "#b3261e", "marker": "x"},
}
_FLOOR: dict[str, Any] = {"color": "#444444", "linestyle": (0, (1, 2)), "linewidth": 1.4}


def ours(results: Results, *series: str, of: Callable[[Point], float] = lambda point: point.time) -> Line:
    """xccl's times: medians over the runs beside each MPI."""
    found = {x: points for name in series for x, points in results.of(name).items()}
    return list(found), [statistics.median(of(point) for point in points) for points in found.values()]


def theirs(results: Results, mpi: str, *series: str) -> Line:
    """The times of one MPI."""
    points = [p for name in series for every in results.of(name).values() for p in every if p.mpi == mpi and p.theirs]
    return [point.x for point in points], [point.mpi_time for point in points]


def ratios(results: Results, *series: str) -> Line:
    """xccl's times / those of the fastest MPI."""
    found = {x: point.ratio for name in series for x, point in results.best(name).items()}
    return list(found), list(found.values())


def send(results: Results, path: Path) -> None:
    """Time and bandwidth of a message against its size."""
    figure, panels = _panels(1, 2, (10.5, 4.4))
    lines: list[tuple[str, Line, dict[str, Any]]] = [
        ("xccl", ours(results, "send-small", "send-large"), _XCCL),
        ("xccl, symmetric arrays", ours(results, "send-large-symmetric"), _SYMMETRIC),
        ("xccl, prepared", ours(results, "send-small-prepared"), _PREPARED),
    ]
    lines += [
        (label, theirs(results, mpi, "send-small", "send-large"), _MPIS[mpi]) for mpi, label in results.mpis.items()
    ]
    for label, (x, y), style in lines:
        panels[0].plot(x, y, label=label, **style)
        panels[1].plot(x, [size / time / 1e3 for size, time in zip(x, y, strict=True)], label=label, **style)
    _time(panels[0], "half a ping-pong, 2 ranks")
    panels[1].set(title="bandwidth", ylabel="GB/s", xscale="log", ylim=(0, None))
    for panel in panels:
        _sizes(panel, "bytes of a message")
    panels[0].legend(loc="upper left")
    _save(figure, path)


def all_to_all(results: Results, path: Path) -> None:
    """Time against bytes to each peer, on 2 and on 8 ranks."""
    figure, panels = _panels(1, 2, (10.5, 4.4))
    for panel, ranks in zip(panels, (2, 8), strict=True):
        names = f"all_to_all-{ranks}-small", f"all_to_all-{ranks}-large"
        panel.plot(*ours(results, *names), label="xccl", **_XCCL)
        panel.plot(*ours(results, f"{names[1]}-symmetric"), label="xccl, symmetric arrays", **_SYMMETRIC)
        for mpi, label in results.mpis.items():
            panel.plot(*theirs(results, mpi, *names), label=label, **_MPIS[mpi])
        _time(panel, f"all_to_all, {ranks} ranks")
        _sizes(panel, "bytes to each peer")
    panels[0].legend(loc="upper left")
    _save(figure, path)


def ratio(results: Results, path: Path) -> None:
    """Ratio to the fastest MPI against size."""
    figure, panels = _panels(1, 2, (10.5, 4.6), sharey=True)
    for panel, ranks in zip(panels, (2, 8), strict=True):
        exchange = f"all_to_all-{ranks}"
        series: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
            "all_to_all": ((f"{exchange}-small", f"{exchange}-large"), {"color": "#0b5fa5", "marker": "o"}),
            "all_to_all, symmetric": ((f"{exchange}-large-symmetric",), _SYMMETRIC | {"linewidth": 1.5}),
            "all_reduce": ((f"all_reduce-{ranks}",), {"color": "#2e7d32", "marker": "v"}),
        }
        if ranks == 2:
            series |= {
                "send": (("send-small", "send-large"), {"color": "#e07b00", "marker": "^"}),
                "send, symmetric": (("send-large-symmetric",), {"color": "#f4b266", "marker": "s", "linestyle": "--"}),
                "send, prepared": (("send-small-prepared",), {"color": "#8f4e00", "marker": "D", "linestyle": ":"}),
                "put_signal": (("put_signal",), {"color": "#8a2be2", "marker": "x"}),
            }
        for label, (names, style) in series.items():
            panel.plot(*ratios(results, *names), label=label, **style)
        panel.axhline(1, color="black", linewidth=1)
        panel.set(title=f"{ranks} ranks", yscale="log")
        panel.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_locator(NullLocator())
        _sizes(panel, "bytes (all_to_all: to each peer)")
    panels[0].set_ylabel("time / time of the fastest MPI")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    _save(figure, path)


def moe(results: Results, path: Path) -> None:
    """dispatch + combine against tokens of a rank, on 2, 4 and 8 ranks."""
    figure, panels = _panels(1, 3, (10.5, 4.4), sharey=True)
    for panel, ranks in zip(panels, (2, 4, 8), strict=True):
        name = f"moe-{ranks}"
        for label, series, style in (
            ("NumPy + fastest MPI", name, {"color": "#b3261e", "marker": "x"}),
            ("fastest MPI, only the packed bytes", f"{name}-packed", {"color": "#e07b00", "marker": "^"}),
        ):
            best = results.best(series)
            panel.plot(list(best), [point.mpi_time for point in best.values()], label=label, **style)
        panel.plot(*ours(results, name), label="xccl", **_XCCL)
        floor = ours(results, name, of=lambda point: statistics.median(point.floor))
        panel.plot(*floor, label="memcpy of the bytes that must move", **_FLOOR)
        _time(panel, f"{ranks} ranks")
        panel.set(xscale="log", xlabel="tokens of a rank")
        panel.set_xticks([8, 32, 128], ["8", "32", "128"])
        panel.xaxis.set_minor_locator(NullLocator())
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    _save(figure, path)


def ranks(results: Results, path: Path) -> None:
    """Time against the number of ranks."""
    figure, panels = _panels(2, 2, (10.5, 7.4))
    for panel, (operation, title) in zip(
        panels,
        (
            ("barrier", "barrier"),
            ("all_to_all", "all_to_all, 8 bytes to each peer"),
            ("dispatch", "dispatch, 1 token a rank"),
            ("moe", "dispatch + combine, 32 tokens a rank"),
        ),
        strict=True,
    ):
        for mpi, label in results.mpis.items():
            panel.plot(*_by_ranks(results, operation, mpi, lambda point: point.mpi_time), label=label, **_MPIS[mpi])
        where = ALONE if operation != "moe" else None
        panel.plot(*_by_ranks(results, operation, where, lambda point: point.time), label="xccl", **_XCCL)
        _time(panel, title)
        panel.axvline(results.about["cores"], color="black", linewidth=0.8, linestyle=":")
        panel.set(xscale="log", xlabel="ranks", xlim=(1.8, 72))
        panel.set_xticks([2, 4, 8, 16, 32, 64], ["2", "4", "8", "16", "32", "64"])
        panel.xaxis.set_minor_locator(NullLocator())
    panels[0].legend(loc="upper left")
    _save(figure, path)


def _by_ranks(results: Results, operation: str, mpi: str | None, of: Callable[[Point], float]) -> Line:
    """Medians over the MPIs, or beside one of them, for each number of ranks."""
    found: dict[int, list[float]] = {}
    for series in GROWTH.values():
        if series.settings.operation == operation:
            points: Iterable[Point] = (point for every in results.of(series.name).values() for point in every)
            for point in points:
                if mpi in (None, point.mpi):
                    found.setdefault(series.ranks, []).append(of(point))
    return sorted(found), [statistics.median(found[number]) for number in sorted(found)]


def _panels(rows: int, columns: int, size: tuple[float, float], **more: Any) -> tuple[Any, list[Any]]:
    pyplot.rcParams.update({"font.size": 10, "axes.titlesize": 11, "lines.markersize": 4.5, "legend.fontsize": 9})
    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **more)
    panels = list(axes.flat)
    for panel in panels:
        panel.grid(True, alpha=0.25)
    return figure, panels


def _time(panel: Any, title: str) -> None:
    panel.set(title=title, ylabel="median time", yscale="log")
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _duration(value)))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _duration(microseconds: float) -> str:
    return f"{microseconds:g} µs" if microseconds < 1000 else f"{microseconds / 1000:g} ms"


def _sizes(panel: Any, label: str) -> None:
    limits = panel.get_xlim()
    panel.set(xscale="log", xlabel=label)
    sizes = [1 << power for power in range(3, 24, 3) if 1 << power <= limits[1]]
    panel.set_xticks(sizes, [size_name(size) for size in sizes])
    panel.xaxis.set_minor_locator(NullLocator())


def size_name(nbytes: int) -> str:
    """ "64 KiB" for 65536."""
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit and nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    pyplot.close(figure)
    # 64 colours make a third of the bytes; nothing else is in the file, so the same results give the same bytes
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


FIGURES: dict[str, Callable[[Results, Path], None]] = {
    "send": send,
    "all_to_all": all_to_all,
    "ratio": ratio,
    "moe": moe,
    "ranks": ranks,
}
