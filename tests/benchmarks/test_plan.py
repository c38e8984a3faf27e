"""The plan can be measured as it stands, and every target has its series."""

from __future__ import annotations

import pytest

from benchmarks.plan import EVERY, IDLE, SERIES, TARGETS, Series
from xccl.bench import runner
from xccl.bench.operations import OPERATIONS
from xccl.bench.settings import Settings
from xccl.cli import main


@pytest.mark.parametrize("series", EVERY.values(), ids=lambda series: series.name)
def test_every_series_can_be_measured(series: Series) -> None:
    operation, _ = runner.find(series.settings, series.ranks)
    for each in (series, series.shortened()):
        counts = operation.counts(each.settings, 4, each.ranks)
        assert counts
        assert len(counts) <= (2 if each is not series else 99)


def test_every_target_has_a_series_and_its_range_a_size() -> None:
    assert len({target.name for target in TARGETS}) == len(TARGETS)
    for target in TARGETS:
        if target is IDLE:
            continue
        series = SERIES[target.series]
        low, high = target.x or (0, 1 << 40)
        if series.unit == "tokens":
            places = list(series.settings.tokens)
        else:
            places = [size // (series.ranks if series.unit == "B a peer" else 1) for size in series.settings.sizes()]
        assert any(low <= place <= high for place in places), target


def test_ends_of_a_short_series_are_those_of_the_long_one() -> None:
    for series in EVERY.values():
        short, long = series.shortened().settings, series.settings
        assert short.sizes()[0] == long.sizes()[0]
        assert short.sizes()[-1] == long.sizes()[-1]
        assert short.tokens[0] == long.tokens[0]
        assert short.tokens[-1] == long.tokens[-1]


def test_places_are_bytes_or_bytes_a_peer_or_tokens() -> None:
    assert Series("", 8, Settings("all_to_all")).x(1024, 256) == 128
    assert Series("", 8, Settings("send")).x(1024, 256) == 1024
    assert Series("", 8, Settings("moe")).x(99999, 32) == 32


@pytest.mark.parametrize("series", EVERY.values(), ids=lambda series: series.name)
def test_the_command_of_a_series_has_its_settings(series: Series, monkeypatch: pytest.MonkeyPatch) -> None:
    words = series.command.split()
    assert f"-n {series.ranks}" in series.command
    taken: list[Settings] = []

    def stop(settings: Settings, ranks: int) -> None:
        taken.append(settings)
        raise SystemExit

    monkeypatch.setattr(runner, "find", stop)
    monkeypatch.setattr("xccl.cli_bench.launcher", lambda: None if series.settings.versus is None else "mpirun")
    monkeypatch.setattr("xccl.init", lambda: _World(series.ranks))
    start = words.index("xccl.bench") + 1 if "xccl.bench" in words else 2
    with pytest.raises(SystemExit):
        main(["bench", *words[start:]])
    given = series.settings
    same = ("operation", "versus", "symmetric", "prepared", "dtype")
    assert [getattr(taken[0], name) for name in same] == [getattr(given, name) for name in same]
    if series.unit == "tokens":
        assert taken[0].tokens == given.tokens
    elif OPERATIONS[given.operation].counts(given, 4, 2) != [0]:
        assert taken[0].sizes() == given.sizes()


class _World:
    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> _World:
        return self

    def __exit__(self, *error: object) -> None:
        pass
