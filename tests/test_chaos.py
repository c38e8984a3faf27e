"""XCCL_CHAOS: every protocol stands it, the same seed does the same, and programs that rely on too much are found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chaos_cases import CASES, options, run_seeds
from support import ranks

import xccl
from xccl._binding import check, lib

BATCH = 40
BATCHES = [(first, nranks) for first, nranks in zip(range(1, 201, BATCH), (3, 4, 2, 3, 5), strict=True)]


@pytest.mark.parametrize(("first", "nranks"), BATCHES)
@pytest.mark.parametrize("name", CASES)
def test_every_protocol_stands_200_seeds(name: str, first: int, nranks: int) -> None:
    run_seeds(CASES[name], range(first, first + BATCH), nranks)


@pytest.mark.parametrize("name", ["litmus", "collectives", "experts"])
def test_ranks_may_be_threads(name: str) -> None:
    run_seeds(CASES[name], range(201, 206), 3, host="threads")


# ---- programs that rely on more than the memory model promises ----


def missing_quiet(comm: xccl.Communicator) -> int:
    """Rank 0 puts to rank 2 and tells rank 1, which tells rank 2. How often rank 2 does not see the put."""
    a, told, done = comm.zeros(1, np.int64), comm.signal(), comm.signal()
    missed = 0
    for turn in range(1, 11):
        if comm.rank == 0:
            comm.put(a, np.array([turn]), 2)
            comm.signal_op(told, turn, 1)
            comm.wait_until(done, ">=", turn)
        elif comm.rank == 1:
            comm.wait_until(told, ">=", turn)
            comm.signal_op(told, turn, 2)
        else:
            comm.wait_until(told, ">=", turn)
            missed += int(a[0]) != turn
            comm.signal_op(done, turn, 0)
    return missed


def missing_fence(comm: xccl.Communicator) -> int:
    """A flag is put after the data, to the same rank, without a fence. How often the flag comes first."""
    a, flag, done = comm.zeros(1, np.int64), comm.zeros(1, np.int64), comm.signal()
    missed = 0
    for turn in range(1, 11):
        if comm.rank == 0:
            comm.put(a, np.array([turn]), 1)
            comm.put(flag, np.array([turn]), 1)
            comm.wait_until(done, ">=", turn)
        elif comm.rank == 1:
            while comm.atomic_fetch(flag, 1) != turn:
                pass
            missed += int(comm.atomic_fetch(a, 1)) != turn
            comm.signal_op(done, turn, 0)
    return missed


@pytest.mark.parametrize("program", [missing_quiet, missing_fence])
def test_a_program_that_lacks_an_order_is_found_by_most_seeds(program: Any) -> None:
    def body(comm: xccl.Communicator) -> list[int]:
        missed = []
        for seed in range(1, 31):
            if lib.xccl_chaos_seed(comm._world._w):
                check(lib.xccl_chaos_reseed(comm._world._w, seed))
            missed.append(program(comm))
            comm._sync(None)
        return missed

    assert np.sum(xccl.run(body, 3, timeout=60)) == 0, "this machine keeps the order by itself"
    with options(chaos=1):
        found = np.sum(xccl.run(body, 3, timeout=60), axis=0) > 0
    assert np.count_nonzero(found) > len(found) // 2


# ---- the same seed ----


def visible_puts(comm: xccl.Communicator, arrays: dict[int, Any], seed: int) -> list[int]:
    """What of its puts to rank 1 is visible after each of them, as rank 0 sees through the array of rank 1's thread."""
    check(lib.xccl_chaos_reseed(comm._world._w, seed))
    arrays[comm.rank] = comm.zeros(64, np.int64)
    comm._sync(None)
    seen = []
    for turn in range(50 if comm.rank == 0 else 0):
        comm.put(arrays[0][turn : turn + 8], np.full(8, turn + 1), 1)
        if turn % 7 == 6:
            comm.fence()
        seen.append(hash(arrays[1].tobytes()))
    comm._sync(None)
    return seen


def test_the_same_seed_makes_puts_visible_in_the_same_order() -> None:
    def once(seed: int) -> list[int]:
        with options(chaos=1):
            return xccl.run(visible_puts, 2, {}, seed, timeout=30, host="threads")[0]

    first = [once(seed) for seed in range(1, 6)]
    assert [once(seed) for seed in range(1, 6)] == first
    assert len({tuple(seen) for seen in first}) == 5, "other seeds make another order"


# ---- the seed is named ----


def test_errors_of_the_library_name_the_seed() -> None:
    with options(chaos=17), xccl.init() as comm:
        with pytest.raises(xccl.XcclTimeout, match=r"XCCL_CHAOS=17"):
            comm.wait_until(comm.signal(), "==", 1, timeout=0.01)
        check(lib.xccl_chaos_reseed(comm._world._w, 18))
        with pytest.raises(xccl.XcclUsageError, match=r"XCCL_CHAOS=18"):
            comm.put(np.zeros(3), np.zeros(3), 0)
    with xccl.init() as comm, pytest.raises(xccl.XcclUsageError) as plain:
        comm.put(np.zeros(3), np.zeros(3), 0)
    assert "XCCL_CHAOS" not in str(plain.value)


@pytest.mark.parametrize("host", ["processes", "threads"])
def test_errors_of_a_program_name_the_seed(host: Any) -> None:
    def body(comm: xccl.Communicator) -> None:
        check(lib.xccl_chaos_reseed(comm._world._w, 23))
        if comm.rank == 1:
            raise ValueError("the program's own")
        comm.barrier()

    with options(chaos=17), pytest.raises(xccl.XcclAborted, match=r"the program's own\n\(XCCL_CHAOS=23\)"):
        xccl.run(body, 2, timeout=30, host=host)


def test_the_launcher_takes_a_seed_and_names_it(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import xccl\ncomm = xccl.init()\ncomm.barrier()\nraise SystemExit(comm.rank)\n")
    command = [sys.executable, "-m", "xccl", "run", "-n", "2", "--chaos", "17", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "XCCL_CHAOS=17" in done.stderr


@ranks(1)
def test_a_seed_needs_a_world_made_with_one(comm: xccl.Communicator) -> None:
    with pytest.raises(xccl.XcclUsageError, match="made with one"):
        check(lib.xccl_chaos_reseed(comm._world._w, 1))
    assert lib.xccl_chaos_seed(comm._world._w) == 0
