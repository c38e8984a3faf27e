"""The table at the end of a run."""

from __future__ import annotations

from rich.table import Table

from xccl.serving.statistics import Summary


def summary_table(summary: Summary) -> Table:
    """Figures of a run as a two-column table; a figure without data is a dash."""
    table = Table(title=f"xccl serve: {counted(summary.ranks, 'rank')}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = [
        ("requests", str(summary.requests)),
        ("tokens generated", str(summary.tokens)),
        ("steps", str(summary.steps)),
        ("time to first token p50 / p99", _pair(_scaled(summary.ttft_p50), _scaled(summary.ttft_p99), 1, "ms")),
        ("time per output token p50 / p99", _pair(summary.tpot_p50, summary.tpot_p99, 2, "ms")),
        ("tokens/s", f"{summary.tokens_per_second:.0f}"),
        ("dispatch p50 / p99", _pair(summary.dispatch_p50, summary.dispatch_p99, 0, "us")),
        ("combine p50 / p99", _pair(summary.combine_p50, summary.combine_p99, 0, "us")),
        ("rows received a rank and layer, max / mean", _pair(summary.recv_max, summary.recv_mean, 1, "")),
        ("  max over mean", _single(summary.recv_imbalance)),
        ("expert load, max over mean", _single(summary.expert_imbalance)),
        ("MTP drafts accepted", _percent(summary.mtp_acceptance)),
    ]
    for label, value in rows:
        table.add_row(label, value)
    return table


def counted(count: int, noun: str) -> str:
    """Count and noun, "1 rank" or "2 ranks"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _scaled(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _pair(first: float | None, second: float | None, digits: int, unit: str) -> str:
    if first is None or second is None:
        return "-"
    return f"{first:.{digits}f} / {second:.{digits}f} {unit}".rstrip()


def _single(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
