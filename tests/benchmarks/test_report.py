"""The page, its figures and the table of the README are made from results, the same from the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from made_up import made_up

from benchmarks import report
from benchmarks.plan import EVERY, TARGETS
from benchmarks.results import Results

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    report.write(made_up(), folder / "performance.md", folder / "performance")
    return folder / "performance.md"


def test_the_page_has_every_target_and_every_series(page: Path) -> None:
    text = page.read_text()
    for target in TARGETS:
        assert f"| {target.row} | {target.goal} |" in text
    for name, series in EVERY.items():
        assert f"### {name}\n\n`{series.command}`" in text
    assert "$" not in text


def test_the_figures_are_there_and_small(page: Path) -> None:
    figures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.read_text())
    assert len(figures) == len(report.figures.FIGURES)
    for figure in figures:
        content = (page.parent / figure).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) < 100_000


def test_the_same_results_give_the_same_bytes(page: Path, tmp_path: Path) -> None:
    report.write(made_up(), tmp_path / "performance.md", tmp_path / "performance")
    for file in [page, *sorted((page.parent / "performance").iterdir())]:
        assert (tmp_path / file.relative_to(page.parent)).read_bytes() == file.read_bytes(), file.name


def test_the_published_page_is_made_from_the_published_results(tmp_path: Path) -> None:
    results = Results.load(report.PUBLISHED)
    report.write(results, tmp_path / "performance.md", tmp_path / "performance")
    assert (tmp_path / "performance.md").read_text() == report.PAGE.read_text(), "run python -m benchmarks.report"
    readme = report.README.read_text()
    assert report.write_readme(readme, report.readme_table(results)) == readme, "run python -m benchmarks.report"


def test_the_readme_changes_only_between_its_marks() -> None:
    text = "before\n<!-- measured: made by benchmarks/report.py -->\nold\n<!-- /measured -->\nafter\n"
    new = report.write_readme(text, report.readme_table(made_up()))
    assert new.startswith("before\n<!-- measured: made by benchmarks/report.py -->\nMeasured on 2026-01-01")
    assert new.endswith("\n<!-- /measured -->\nafter\n")
    assert "old" not in new
    assert "| send, 8 B | 1 | 2 | 0.50 | Open MPI |" in new
    with pytest.raises(SystemExit, match="marks"):
        report.write_readme("no marks", "")


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [(0.51234, "0.512"), (12.345, "12.3"), (54095.4, "54100"), (2.0, "2"), (1.2e6, "1200000")],
)
def test_times_have_three_digits(microseconds: float, text: str) -> None:
    assert report.time_name(microseconds) == text
