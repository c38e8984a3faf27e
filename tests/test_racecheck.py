"""The race checker: silent for what docs/memory-model.md promises, and a report for each way to miss it.

The programs declare their loads with local_read: NumPy's are not seen.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support import ranks

import xccl

Program = Callable[[xccl.Communicator], None]
ONE = np.array([1])


@pytest.fixture(autouse=True)
def _on() -> Iterator[None]:
    xccl.rc.racecheck = "1"
    yield
    del xccl.rc.racecheck


def race_of(program: Program, nranks: int, host: str = "processes") -> xccl.XcclRaceError:
    """The error with which one rank of `program` ends."""
    with pytest.raises(xccl.XcclAborted) as caught:
        xccl.run(program, nranks, timeout=60, host=host)
    error = caught.value.__cause__
    assert isinstance(error, xccl.XcclRaceError), caught.value
    return error


def lines_of(program: Program) -> tuple[int, int]:
    """First and last line of the program's text."""
    start = program.__code__.co_firstlineno
    return start, max(line for _, _, line in program.__code__.co_lines() if line is not None)


# ---- what is ordered ----


def message_passing(comm: xccl.Communicator) -> None:
    """Promises 1 and 2, and the pattern that writes again when the reader is done."""
    a, full, free = comm.zeros((3, 50), "int64"), comm.signal(), comm.signal()
    for turn in range(1, 20):
        if comm.rank == 0:
            comm.wait_until(free, ">=", turn - 1)
            comm.put(a[0], np.full(50, turn), 1)
            comm.put(a[1], np.full(50, turn), 1)
            comm.put_signal(a[2], np.full(50, turn), 1, signal=full, value=turn)
        elif comm.rank == 1:
            comm.wait_until(full, ">=", turn)
            comm.local_read(a)
            assert (a == turn).all()
            comm.signal_op(free, turn, 0)


def put_seen_after_fence(comm: xccl.Communicator) -> None:
    """Promise 3."""
    a, flag = comm.zeros(100, "int64"), comm.zeros(1, "int64")
    if comm.rank == 0:
        for turn in range(1, 5):
            comm.put(a[10 * turn : 10 * turn + 10], np.full(10, turn), 1)
            comm.fence()
            comm.put(flag, ONE * turn, 1)
    elif comm.rank == 1:
        while (seen := comm.atomic_fetch(flag, 1)) < 4:
            comm.local_read(a[: 10 * seen + 10])
        comm.local_read(a)


def told_by_a_third(comm: xccl.Communicator) -> None:
    """Promises 1 and 4."""
    a, told = comm.zeros(10, "int64"), comm.signal()
    if comm.rank == 0:
        comm.put(a, np.arange(10), comm.size - 1)
        comm.quiet()
        comm.signal_op(told, 1, 1)
    else:
        comm.wait_until(told, "==", 1)
        if comm.rank + 1 < comm.size:
            comm.signal_op(told, 1, comm.rank + 1)
        else:
            comm.local_read(a)


def lock(comm: xccl.Communicator) -> None:
    """Promise 5: compare-and-swap makes a lock."""
    word, value = comm.zeros(1, "int64"), comm.zeros(1, "int64")
    for _ in range(20):
        while comm.atomic_compare_swap(word, 0, comm.rank + 1, 0) != 0:
            pass
        theirs = comm.ptr(value, 0)
        comm.local_read(theirs)
        comm.local_write(theirs)
        theirs += 1
        comm.atomic_swap(word, 0, 0)
    comm.barrier()
    comm.local_read(value)
    assert comm.rank != 0 or value[0] == 20 * comm.size


def counted_arrivals(comm: xccl.Communicator) -> None:
    """Promise 6: signals that add carry what every sender did."""
    a, arrived = comm.zeros((comm.size, 3), "int64"), comm.signal()
    for turn in range(1, 10):
        for pe in range(comm.size):
            comm.put_signal(a[comm.rank], np.full(3, turn), pe, signal=arrived, value=1, op="add")
        comm.wait_until(arrived, ">=", turn * comm.size)
        comm.local_read(a)
        comm.barrier()


def neighbours_in_a_line(comm: xccl.Communicator) -> None:
    """Different bytes of one cache line are different places."""
    a = comm.zeros(8 * comm.size, "int8")
    part = a[8 * comm.rank :][:8]
    for pe in range(comm.size):
        comm.put(part, part, pe)
    comm.local_write(part)
    comm.barrier()
    comm.local_read(a)


def collectives(comm: xccl.Communicator) -> None:
    """Each is over for its rank's own arrays when it returns."""
    x, out = comm.zeros((comm.size, 3000), "int64"), comm.zeros((comm.size, 3000), "int64")
    for _ in range(3):
        comm.local_write(x)
        comm.all_to_all(x, out=out)
        comm.local_read(out)
        comm.all_reduce(x, out=out)
        comm.all_gather(x[0], out=out)
        comm.reduce_scatter(x, out=out[:1])
        comm.broadcast(x, 0)
        comm.all_to_all_v(x, [1] * comm.size, out=out)
        comm.local_read(out)
        theirs = comm.ptr(x, (comm.rank + 1) % comm.size)
        comm.barrier()
        comm.local_read(theirs)
        comm.barrier()


def messages(comm: xccl.Communicator) -> None:
    """What comes before a send is visible after its receive; also for large and for asynchronous ones."""
    a = comm.zeros(4, "int64")
    big = comm.zeros(100_000, "int64")
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for turn in range(5):
        comm.put(a, np.full(4, turn), to)
        requests = [comm.isend(ONE, to, tag=1), comm.irecv(np.zeros(1, "int64"), source, tag=1)]
        for request in requests:
            request.wait()
        comm.local_read(a)
        sent = comm.isend(big[:50_000], to, tag=2)
        comm.recv(big[50_000:], source, tag=2)
        sent.wait()
        comm.local_write(big)
        comm.barrier()


def experts(comm: xccl.Communicator) -> None:
    """dispatch and combine order all ranks, and take symmetric arrays."""
    ep = xccl.ExpertParallel(comm, 4, 8, 2, 4, "float32")
    x, a = comm.zeros((4, 8), "float32"), comm.zeros(1, "int64")
    for _ in range(4):
        comm.local_write(x)
        comm.put(a, ONE, (comm.rank + 1) % comm.size)
        rows, handle = ep.dispatch(x, np.arange(8).reshape(4, 2) % 4)
        comm.local_read(a)
        ep.combine(rows, handle, out=x)
        comm.local_read(x)
    ep.close()


def groups(comm: xccl.Communicator) -> None:
    """Memory and collectives of a part of the ranks, and memory that is given back and taken anew."""
    half = comm.split(comm.rank % 2)
    assert half is not None
    for _ in range(3):
        a = half.zeros(100, "int64")
        half.put(a, np.ones(100, "int64"), (half.rank + 1) % half.size)
        half.barrier()
        half.local_read(a)
        half.free(a)
        b = comm.zeros(100, "int64")
        comm.local_write(b)
        comm.free(b)
    half.close()


def prepared(comm: xccl.Communicator) -> None:
    """Prepared operations are checked as the others are."""
    a, flag = comm.zeros(5, "int64"), comm.signal()
    put = comm.prepare("put_signal", a, np.ones(5, "int64"), (comm.rank + 1) % comm.size, signal=flag, value=1)
    wait = comm.prepare("wait_until", flag, "==", 1)
    put()
    assert wait() == 1
    comm.local_read(a)


CORRECT = [
    message_passing,
    put_seen_after_fence,
    told_by_a_third,
    lock,
    counted_arrivals,
    neighbours_in_a_line,
    collectives,
    messages,
    experts,
    groups,
    prepared,
]


@pytest.mark.parametrize("program", CORRECT, ids=lambda program: program.__name__)
@pytest.mark.parametrize("nranks", [2, 4])
def test_what_is_ordered_is_not_reported(program: Program, nranks: int) -> None:
    xccl.run(program, nranks, timeout=60)


@pytest.mark.parametrize("program", [message_passing, lock, collectives], ids=lambda program: program.__name__)
def test_ranks_that_are_threads(program: Program) -> None:
    xccl.run(program, 3, timeout=60, host="threads")


# ---- what is not ---- (each program has two lines marked as the two sides)


def await_unseen(word: np.ndarray, value: int) -> None:
    """Waits by plain loads, which the checker does not see: fixes a schedule without ordering anything for it."""
    while word[0] < value:
        time.sleep(0.001)


def missing_wait(comm: xccl.Communicator) -> None:
    a, full = comm.zeros(50, "int64"), comm.signal()
    if comm.rank == 0:
        comm.put_signal(a, np.ones(50, "int64"), 1, signal=full, value=1)  # side
    else:
        comm.local_read(a)  # side


def missing_fence(comm: xccl.Communicator) -> None:
    a, flag = comm.zeros(50, "int64"), comm.zeros(1, "int64")
    if comm.rank == 0:
        comm.put(a, np.ones(50, "int64"), 1)  # side
        comm.put(flag, ONE, 1)
    else:
        while comm.atomic_fetch(flag, 1) == 0:
            pass
        comm.local_read(a)  # side


def missing_quiet(comm: xccl.Communicator) -> None:
    a, told = comm.zeros(50, "int64"), comm.signal()
    if comm.rank == 0:
        comm.put(a, np.ones(50, "int64"), 2)  # side
        comm.signal_op(told, 1, 1)
    elif comm.rank == 1:
        comm.wait_until(told, "==", 1)
        comm.signal_op(told, 1, 2)
    else:
        comm.wait_until(told, "==", 1)
        comm.local_read(a)  # side


def fence_instead_of_quiet(comm: xccl.Communicator) -> None:
    a, told = comm.zeros(50, "int64"), comm.signal()
    if comm.rank == 0:
        comm.put(a, np.ones(50, "int64"), 2)  # side
        comm.fence()
        comm.signal_op(told, 1, 1)
    elif comm.rank == 1:
        comm.wait_until(told, "==", 1)
        comm.signal_op(told, 1, 2)
    else:
        comm.wait_until(told, "==", 1)
        comm.local_read(a)  # side


def signal_before_put(comm: xccl.Communicator) -> None:
    a, full = comm.zeros(50, "int64"), comm.signal()
    if comm.rank == 0:
        comm.signal_op(full, 1, 1)
        comm.put(a, np.ones(50, "int64"), 1)  # side
    else:
        comm.wait_until(full, "==", 1)
        comm.local_read(a)  # side


def signal_to_the_wrong_rank(comm: xccl.Communicator) -> None:
    a, full = comm.zeros(50, "int64"), comm.signal()
    if comm.rank == 0:
        comm.put(a, np.ones(50, "int64"), 1)  # side
        comm.signal_op(full, 1, 2)
    elif comm.rank == 1:
        comm.local_read(a)  # side
    else:
        comm.wait_until(full, "==", 1)


def wait_for_the_wrong_value(comm: xccl.Communicator) -> None:
    """The second turn's wait is over with the first turn's signal (bug class 4: a stale counter)."""
    a, full, unseen = comm.zeros((2, 50), "int64"), comm.signal(), comm.zeros(1, "int64")
    for turn in range(2):
        if comm.rank == 0:
            await_unseen(unseen, 2 * turn)
            comm.put_signal(a[turn], np.ones(50, "int64"), 1, signal=full, value=turn + 1)  # side
        else:
            comm.wait_until(full, ">=", 1)
            comm.local_read(a[turn])  # side
            comm.ptr(unseen, 0)[0] += 1
            if turn == 0:
                comm.local_read(a[1])  # side
                comm.ptr(unseen, 0)[0] += 1


def premature_reuse(comm: xccl.Communicator) -> None:
    """The writer does not wait for the reader."""
    a, full, unseen = comm.zeros(50, "int64"), comm.signal(), comm.zeros(1, "int64")
    for turn in range(1, 3):
        if comm.rank == 0:
            await_unseen(unseen, turn - 1)
            comm.put_signal(a, np.ones(50, "int64"), 1, signal=full, value=turn)  # side
        else:
            comm.wait_until(full, ">=", turn)
            comm.local_read(a)  # side
            comm.ptr(unseen, 0)[0] += 1


def any_arrival_counts(comm: xccl.Communicator) -> None:
    """Bug class 3: a counter that says "two came", not which."""
    a, arrived, unseen = comm.zeros((3, 50), "int64"), comm.signal(), comm.zeros(1, "int64")
    if comm.rank == 0:
        comm.put_signal(a[0], a[0], 2, signal=arrived, value=1, op="add")
        comm.put_signal(a[1], a[1], 2, signal=arrived, value=1, op="add")
    elif comm.rank == 1:
        await_unseen(unseen, 1)
        comm.put_signal(a[2], a[2], 2, signal=arrived, value=1, op="add")  # side
    else:
        comm.wait_until(arrived, ">=", 2)
        comm.local_read(a[2])  # side
        comm.ptr(unseen, 1)[0] = 1


def two_writers(comm: xccl.Communicator) -> None:
    a = comm.zeros(50, "int64")
    comm.put(a, np.ones(50, "int64"), 0)  # side


def ptr_is_no_order(comm: xccl.Communicator) -> None:
    a = comm.zeros(50, "int64")
    if comm.rank == 0:
        comm.local_write(comm.ptr(a, 1))  # side
    else:
        comm.local_read(a[7:8])  # side


def put_into_a_collective(comm: xccl.Communicator) -> None:
    x = comm.zeros(50, "int64")
    if comm.rank == 0:
        comm.put(x, np.ones(50, "int64"), 1)  # side
    comm.all_reduce(x)  # side


def get_from_a_result(comm: xccl.Communicator) -> None:
    """A rank that is through a collective knows nothing of what it still writes elsewhere."""
    x, out = comm.zeros(50, "int64"), comm.zeros((comm.size, 50), "int64")
    comm.all_gather(x, out=out)  # side
    if comm.rank == 0:
        comm.get(np.zeros((comm.size, 50), "int64"), out, 1)  # side


def send_buffer_in_use(comm: xccl.Communicator) -> None:
    a = comm.zeros(50, "int64")
    if comm.rank == 0:
        comm.put(a, np.ones(50, "int64"), 1)  # side
        comm.recv(np.zeros(50, "int64"), 1)
    else:
        comm.send(a, 0)  # side


def receive_without_message(comm: xccl.Communicator) -> None:
    """Another message than the one sent behind the put."""
    a = comm.zeros(50, "int64")
    if comm.rank == 0:
        comm.send(ONE, 1)
        comm.recv(np.zeros(1, "int64"), 1)
        comm.put(a, np.ones(50, "int64"), 1)  # side
    else:
        comm.recv(np.zeros(1, "int64"), 0)
        comm.local_read(a)  # side
        comm.send(ONE, 0)
        comm.local_read(a)  # side


BROKEN = [
    (missing_wait, 2),
    (missing_fence, 2),
    (missing_quiet, 3),
    (fence_instead_of_quiet, 3),
    (signal_before_put, 2),
    (signal_to_the_wrong_rank, 3),
    (wait_for_the_wrong_value, 2),
    (premature_reuse, 2),
    (any_arrival_counts, 3),
    (two_writers, 2),
    (ptr_is_no_order, 2),
    (put_into_a_collective, 2),
    (get_from_a_result, 2),
    (send_buffer_in_use, 2),
    (receive_without_message, 2),
]


def sides_of(program: Program) -> set[int]:
    """Lines of this file that are marked in the program."""
    first, last = lines_of(program)
    text = Path(__file__).read_text().splitlines()
    return {line for line in range(first, last + 1) if text[line - 1].endswith("# side")}


@pytest.mark.parametrize(("program", "nranks"), BROKEN, ids=[program.__name__ for program, _ in BROKEN])
def test_what_is_not_ordered_is_reported_with_both_lines(program: Program, nranks: int) -> None:
    message = str(race_of(program, nranks))
    found = re.findall(r"(first|second):\s+rank (\d).*test_racecheck\.py:(\d+)", message)
    assert [side for side, _, _ in found] == ["first", "second"], message
    assert found[0][1] != found[1][1], "two ranks"
    assert {int(line) for _, _, line in found} <= sides_of(program), message
    assert "int64 [" in message


def test_the_report_names_everything() -> None:
    error = race_of(missing_quiet, 3)
    assert re.fullmatch(
        r"rank (0|2), (put|local_read): race on bytes 0 to 400 of rank 2's copy of int64 \[50\] "
        r"\(made at .*test_racecheck.py:\d+\)\.\n"
        r"  first:  rank \d (reads|writes) them: (put|local_read) at .*test_racecheck.py:\d+\n"
        r"  second: rank \d (reads|writes) bytes 0 to 400: (put|local_read) at .*test_racecheck.py:\d+\n"
        r"  .*",
        str(error),
    ), str(error)


@ranks(2)
def test_undeclared_memory_is_refused(comm: xccl.Communicator) -> None:
    with pytest.raises(xccl.XcclUsageError, match="local_read"):
        comm.local_read(np.zeros(3))


@ranks(2)
def test_strided_views_are_seen_as_they_are(comm: xccl.Communicator) -> None:
    a = comm.zeros((6, 6), "int32")
    comm.local_write(comm.ptr(a, 0)[:, comm.rank :: 2])
    comm.barrier()
    comm.local_read(a.T)


def test_it_is_off_without_being_asked_for() -> None:
    del xccl.rc.racecheck
    xccl.run(missing_wait, 2, timeout=60)


def test_the_command_line_turns_it_on(tmp_path: Path) -> None:
    program = tmp_path / "race.py"
    program.write_text(
        "import numpy as np\nimport xccl\ncomm = xccl.init()\na = comm.zeros(1)\n"
        "comm.put(a, np.ones(1), 0)\ncomm.barrier()\n"
    )
    command = [sys.executable, "-m", "xccl", "run", "-n", "2", "--timeout", "60"]
    assert subprocess.run([*command, str(program)], capture_output=True, timeout=90).returncode == 0
    checked = subprocess.run([*command, "--racecheck", str(program)], capture_output=True, timeout=90, text=True)
    assert checked.returncode == 1
    assert "XcclRaceError" in checked.stderr
    assert "race.py:5" in checked.stderr
