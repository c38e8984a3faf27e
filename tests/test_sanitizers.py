"""The C core under sanitizers, with ranks as threads of one process. `make asan ubsan tsan` runs more of it."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

SANITIZE = Path(__file__).parent / "c" / "sanitize.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sanitize", SANITIZE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sanitize = _load()


@pytest.fixture(scope="module", params=["thread", "address,undefined"])
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    if not sanitize.is_available(request.param):
        pytest.skip(f"this compiler has no -fsanitize={request.param}")
    programs: dict[str, Path] = sanitize.build(request.param, tmp_path_factory.mktemp("sanitized"))
    return programs


def _run(program: Path, *arguments: object) -> None:
    try:
        sanitize.run(program, arguments, 120)
    except subprocess.CalledProcessError as error:
        pytest.fail(f"exit status {error.returncode}\n{error.stdout}", pytrace=False)


def test_the_ring_has_no_race(programs: dict[str, Path]) -> None:
    _run(programs["ring_race"], 10_000)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_no_layer_has_a_race_or_a_bad_access(programs: dict[str, Path], ranks: int) -> None:
    _run(programs["threads_world"], ranks, 12, ranks)


@pytest.mark.parametrize("programs", ["address,undefined"], indirect=True)
@pytest.mark.parametrize("operation", sanitize.FUZZED)
def test_damaged_control_words_end_in_a_result_or_an_error(programs: dict[str, Path], operation: str) -> None:
    _run(programs["fuzz_control"], operation, 0, 25)
