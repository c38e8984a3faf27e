"""What is measured against MPI, and what is to be reached: the table of targets as data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from xccl.bench.settings import Settings

K, M = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Series:
    """One call of `xccl bench` on so many ranks; `settings.versus` None: without MPI."""

    name: str
    ranks: int
    settings: Settings

    def shortened(self) -> Series:
        """The same with the first and the last size only."""
        given = self.settings
        ends = tuple(sorted({given.tokens[0], given.tokens[-1]}))
        return replace(self, settings=replace(given, factor=max(2, given.end // given.begin), tokens=ends))

    @property
    def unit(self) -> str:
        """What `x` counts."""
        if self.settings.operation in ("dispatch", "combine", "moe"):
            return "tokens"
        return "B a peer" if self.settings.operation == "all_to_all" else "B"

    def x(self, size: int, count: int) -> int:
        """Where a row stands: tokens of a rank, or bytes, to each peer in all_to_all."""
        return {"tokens": count, "B": size, "B a peer": size // self.ranks}[self.unit]

    @property
    def command(self) -> str:
        """What measures it alone."""
        given, default = self.settings, Settings(self.settings.operation)
        flags = f" -b {given.begin} -e {given.end} -f {given.factor}" if self.unit != "tokens" else ""
        flags += f" --tokens {','.join(map(str, given.tokens))}" if self.unit == "tokens" else ""
        flags += "".join(f" --{name}" for name in ("symmetric", "prepared") if getattr(given, name))
        flags += f" --dtype {given.dtype}" if given.dtype != default.dtype else ""
        if given.versus is None:
            return f"xccl bench {given.operation} -n {self.ranks}{flags}"
        return f"mpirun -n {self.ranks} python -m xccl.bench {given.operation}{flags} --vs {given.versus}"


@dataclass(frozen=True)
class Target:
    """One row of the table of targets.

    Attributes
    ----------
    judged : str
        By the ratio at the "worst" size, by the "geomean" (geometric mean) over sizes, by the part of the "floor" in
        the time, or by the CPU time of ranks that wait ("idle").
    x : (int, int) or None
        Only this part of the series, from and to; None: all.
    """

    name: str
    row: str
    bound: float
    series: str
    judged: str = "worst"
    x: tuple[int, int] | None = None

    @property
    def goal(self) -> str:
        """As it is printed."""
        return {"floor": "≥ {:g}", "geomean": "mean ≤ {:g}", "worst": "≤ {:g}", "idle": "≤ {:.0%}"}[self.judged].format(
            self.bound
        )

    def met(self, reached: float) -> bool:
        """Whether the row is where it should be."""
        return reached >= self.bound if self.judged == "floor" else reached <= self.bound


IDLE = Target("idle", "8 ranks waiting one second in recv, part of one core in all", 0.02, "idle", "idle")


def _series(name: str, ranks: int, operation: str, sizes: tuple[int, int, int], **more: object) -> Series:
    begin, end, factor = sizes
    given: dict[str, object] = {"versus": "mpi"} | more
    return Series(name, ranks, Settings(operation, begin=begin, end=end, factor=factor, **given))  # type: ignore[arg-type]


def _all_to_all(ranks: int) -> list[Series]:
    """The sizes of `xccl bench` are those of the whole array: so much to each of the ranks."""
    name, small, large = f"all_to_all-{ranks}", (8 * ranks, 16 * K * ranks, 2), (64 * K * ranks, M * ranks, 2)
    return [
        _series(f"{name}-small", ranks, "all_to_all", small),
        _series(f"{name}-large", ranks, "all_to_all", large),
        _series(f"{name}-large-symmetric", ranks, "all_to_all", large, symmetric=True),
    ]


def _moe(ranks: int) -> list[Series]:
    """The shape of DeepSeek, int8 out and bfloat16 back, uniform routing."""
    sizes = (8, 8, 2)
    return [
        _series(f"moe-{ranks}", ranks, "moe", sizes, tokens=(8, 32, 128)),
        _series(f"moe-{ranks}-packed", ranks, "moe", sizes, tokens=(8, 32, 128), versus="mpi-packed"),
    ]


def _growth(ranks: int, versus: str | None) -> list[Series]:
    name = f"{ranks}{'' if versus else '-alone'}"
    sizes = (8 * ranks, 8 * ranks, 2)
    moe = ("moe", (32,)) if versus else ("dispatch", (1,))  # dispatch of a token is hardly more than its metadata
    return [
        _series(f"growth-barrier-{name}", ranks, "barrier", _ONE, versus=versus),
        _series(f"growth-all_to_all-{name}", ranks, "all_to_all", sizes, versus=versus),
        _series(f"growth-{moe[0]}-{name}", ranks, moe[0], _ONE, versus=versus, tokens=moe[1]),
    ]


_SMALL, _LARGE, _ALL = (8, 32 * K, 8), (64 * K, 8 * M, 2), (8, 8 * M, 4)
_ONE = (8, 8, 2)
_BIG = (256 * K, M)


def _by_name(*every: Series) -> dict[str, Series]:
    return {series.name: series for series in every}


SERIES = _by_name(
    _series("send-small", 2, "send", _SMALL),
    _series("send-small-prepared", 2, "send", _SMALL, prepared=True),
    _series("send-large", 2, "send", _LARGE),
    _series("send-large-symmetric", 2, "send", _LARGE, symmetric=True),
    _series("put_signal", 2, "put_signal", _SMALL),
    _series("put_signal-prepared", 2, "put_signal", _ONE, prepared=True),
    _series("put", 2, "put", _ONE),
    *_all_to_all(2),
    *_all_to_all(8),
    *(_series(f"barrier-{ranks}", ranks, "barrier", _ONE) for ranks in (2, 8, 16)),
    *(_series(f"all_reduce-{ranks}", ranks, "all_reduce", _ALL) for ranks in (2, 8)),
    *(series for ranks in (2, 4, 8) for series in _moe(ranks)),
)

# How time grows with ranks: against MPI, and alone on many more ranks than cores.
GROWTH = _by_name(
    *(series for ranks in (2, 4, 8, 16) for series in _growth(ranks, "mpi")),
    *(series for ranks in (2, 4, 8, 16, 32, 64) for series in _growth(ranks, None)),
)

EVERY = SERIES | GROWTH

TARGETS: list[Target] = [
    Target("send-8", "send, 8 B, one way, 2 pinned ranks", 0.6, "send-small", x=(8, 8)),
    Target("send-8-prepared", "the same, prepared", 0.4, "send-small-prepared", x=(8, 8)),
    Target("put_signal-8", "put + signal seen by the peer, 8 B", 0.5, "put_signal", x=(8, 8)),
    Target("send-large", "send, 64 KiB - 8 MiB", 0.9, "send-large"),
    Target("send-large-symmetric", "the same, symmetric arrays", 0.6, "send-large-symmetric"),
    Target("all_to_all-2-small", "all_to_all, 8 B - 16 KiB a peer, 2 ranks", 0.5, "all_to_all-2-small", "geomean"),
    Target("all_to_all-2-small-worst", "the same, worst size", 0.7, "all_to_all-2-small"),
    Target("all_to_all-2-large", "all_to_all, 64 KiB - 1 MiB a peer, 2 ranks", 0.8, "all_to_all-2-large"),
    Target("all_to_all-2-large-symmetric", "the same, symmetric arrays", 0.55, "all_to_all-2-large-symmetric"),
    Target("all_to_all-8-small", "all_to_all, 8 B - 16 KiB a peer, 8 ranks", 0.5, "all_to_all-8-small", "geomean"),
    Target("all_to_all-8-large", "all_to_all, 256 KiB - 1 MiB a peer, 8 ranks", 1.0, "all_to_all-8-large", x=_BIG),
    Target("all_to_all-8-large-symmetric", "the same, symmetric arrays", 0.8, "all_to_all-8-large-symmetric", x=_BIG),
    *(Target(f"barrier-{n}", f"barrier, {n} ranks", 0.6 if n == 2 else 0.5, f"barrier-{n}") for n in (2, 8, 16)),
    *(
        Target(f"all_reduce-{n}", f"all_reduce, 8 B - 8 MiB, {n} ranks", 0.7, f"all_reduce-{n}", "geomean")
        for n in (2, 8)
    ),
    *(Target(f"moe-{n}", f"moe, 8 - 128 tokens, {n} ranks, against NumPy + MPI", 0.05, f"moe-{n}") for n in (2, 4, 8)),
    *(
        Target(f"moe-{n}-packed", f"moe, 8 - 128 tokens, {n} ranks, against MPI's bytes only", 0.8, f"moe-{n}-packed")
        for n in (2, 4, 8)
    ),
    Target("moe-floor", "moe, 128 tokens, 2 ranks: memcpy of its bytes / time", 0.5, "moe-2", "floor", x=(128, 128)),
    IDLE,
]
