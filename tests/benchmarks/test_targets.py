"""Targets are judged as their rows say, on made-up results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_up import made_up
from rich.console import Console

from benchmarks import campaign, targets
from benchmarks.campaign import ALONE, Job
from benchmarks.plan import EVERY, GROWTH, IDLE, SERIES, TARGETS, Target
from benchmarks.results import Results
from benchmarks.targets import judge, main


def _target(name: str) -> Target:
    return next(target for target in TARGETS if target.name == name)


def _reached(name: str, results: Results) -> float:
    verdict = judge(_target(name), results)
    assert verdict is not None
    return verdict.reached


def test_the_worst_size_counts_unless_the_row_asks_for_a_mean() -> None:
    results = made_up(lambda x: 2.0 if x == 8 else 0.5)
    assert _reached("all_to_all-2-small-worst", results) == 1.0
    sizes = len(SERIES["all_to_all-2-small"].settings.sizes())
    assert _reached("all_to_all-2-small", results) == pytest.approx((1.0 * 0.25 ** (sizes - 1)) ** (1 / sizes))


def test_only_the_sizes_of_the_row_count() -> None:
    results = made_up(lambda x: 1000.0 if x < 256 << 10 else 1.0)
    assert _reached("all_to_all-8-large", results) == 0.5
    assert _reached("all_to_all-2-large", results) == 500.0


def test_the_row_of_the_floor_is_to_be_large() -> None:
    target = _target("moe-floor")
    assert _reached("moe-floor", made_up(floor=0.75)) == 0.75
    assert target.met(0.5)
    assert not target.met(0.49)


def test_the_fastest_mpi_is_named() -> None:
    verdict = judge(_target("send-large"), made_up())
    assert verdict is not None
    assert verdict.best == "Open MPI 8"
    assert verdict.met
    assert not _target("send-8-prepared").met(0.5)


def test_what_was_not_measured_is_no_row() -> None:
    assert all(judge(target, Results()) is None for target in TARGETS)


def test_waiting_ranks_are_judged_by_their_cpu_time() -> None:
    assert _reached(IDLE.name, made_up()) == 0.01
    assert IDLE.met(0.01)
    assert not IDLE.met(0.03)


def test_jobs_hold_all_series_and_the_mpis_take_turns() -> None:
    jobs = list(campaign.jobs(EVERY.values(), ["a", "b"]))
    held = [(job.mpi, name) for job in jobs for name in job.series]
    assert len(held) == len(set(held))
    for name, series in EVERY.items():
        assert {mpi for mpi, other in held if other == name} == ({"a", "b"} if series.settings.versus else {ALONE})
        assert all(job.ranks == series.ranks for job in jobs if name in job.series)
    assert [job.mpi for job in jobs[:4]] == ["a", "b", "a", "b"]


def test_show_prints_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    file = tmp_path / "results.json"
    made_up().save(file)
    monkeypatch.setattr("sys.argv", ["targets", "--show", str(file)])
    main()
    printed = capsys.readouterr().out
    for target in TARGETS:
        assert target.name in printed
    for name in EVERY:
        assert name in printed


def test_growth_without_mpi_is_measured_by_one_command(tmp_path: Path) -> None:
    """The way from a job through ranks that measure to a point, with xccl's own launcher."""
    results = Results()
    job = Job(
        ALONE, 2, tuple(name for name, series in GROWTH.items() if series.ranks == 2 and not series.settings.versus)
    )
    content = campaign.run(job, {}, blocks=2, short=True)
    campaign.collect(results, job, content)
    assert {point.series for point in results.points} == set(job.series)
    assert all(point.time > 0 and point.floor[0] > 0 and not point.theirs for point in results.points)
    assert results.about["cores"] >= 1


def test_a_failed_job_shows_its_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "fails.py"
    program.write_text("raise SystemExit('no measurement: wrong results')")
    monkeypatch.setattr(campaign, "_MEASURE", program)
    with pytest.raises(SystemExit, match="no measurement: wrong results"):
        campaign.run(Job(ALONE, 2, ("growth-barrier-2-alone",)), {}, blocks=2, short=True)


def test_ranks_that_wait_are_measured() -> None:
    results = Results()
    campaign.wait_idle(results)
    assert 0 < results.idle[0] < 9
    assert targets.summary(results).row_count == 1
    Console(quiet=True).print(targets.details(results))
