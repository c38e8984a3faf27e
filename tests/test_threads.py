"""xccl.run(host="threads"): ranks that share a process."""

from __future__ import annotations

import gc
import threading
import time

import numpy as np
import pytest

import xccl

pytestmark = pytest.mark.timeout(60)


def run(fn, nranks: int, *args: object, timeout: float = 30) -> list:
    return xccl.run(fn, nranks, *args, timeout=timeout, host="threads")


def _mapped() -> int:
    with open("/proc/self/maps") as maps:
        return sum("/dev/shm/" in line for line in maps)


@pytest.mark.parametrize("nranks", [1, 2, 5])
def test_results_come_by_rank_and_need_no_pickling(nranks: int) -> None:
    lock = threading.Lock()  # cannot be pickled
    assert run(lambda comm, more: (comm.rank + more, comm.size, lock), nranks, 7) == [
        (rank + 7, nranks, lock) for rank in range(nranks)
    ]


@pytest.mark.parametrize("nranks", [2, 4])
def test_every_layer_works(nranks: int) -> None:
    def use_all(comm: xccl.Communicator) -> None:
        to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        assert comm.all_reduce(np.array([comm.rank])).tolist() == [sum(range(comm.size))]
        for count in (4, 3000, 100_000):
            assert (comm.all_to_all(np.full(count * comm.size, comm.rank))[::count] == np.arange(comm.size)).all()
            request = comm.isend(np.full(count, comm.rank), to)
            received = np.zeros(count, int)
            comm.recv(received, source)
            request.wait()
            assert (received == source).all()
        a, flag = comm.zeros(3, "int64"), comm.signal()
        comm.put_signal(a, np.full(3, comm.rank), to, signal=flag, value=1)
        comm.wait_until(flag, "==", 1)
        assert a.tolist() == [source] * 3
        group = comm.split(comm.rank % 2)
        assert group is not None
        assert group.all_gather(np.array([comm.rank]))[0, 0] == comm.rank % 2
        group.close()
        ep = xccl.ExpertParallel(comm, 2 * comm.size, 64, 2, 16, dtype="float32")
        x = np.full((5, 64), comm.rank, "float32")
        y, handle = ep.dispatch(x, np.array([[0, -1], [1, 3], [3, 2], [-1, -1], [2, 1]]))
        assert np.array_equal(
            ep.combine(y, handle)[:, 0] / max(comm.rank, 1), [1, 2, 2, 0, 2] if comm.rank else [0] * 5
        )
        del y
        ep.close()

    run(use_all, nranks)


def test_a_symmetric_array_may_be_the_result() -> None:
    before = _mapped()
    arrays = run(lambda comm: comm.full(1000, comm.rank), 3)
    gc.collect()
    assert [int(a.sum()) for a in arrays] == [0, 1000, 2000]
    assert _mapped() == before + 1, "the ranks share one mapping"
    del arrays
    gc.collect()
    assert _mapped() == before


def test_an_exception_ends_all_and_is_the_cause() -> None:
    class Unpicklable(Exception):
        def __reduce__(self) -> str:
            raise TypeError

    def fail_on_one(comm: xccl.Communicator) -> None:
        if comm.rank == 1:
            raise Unpicklable("the reason")
        comm._sync(None)

    with pytest.raises(xccl.XcclAborted, match="rank 1 raised") as caught:
        run(fail_on_one, 3)
    assert caught.value.rank == 1
    assert "fail_on_one" in caught.value.traceback_text
    assert isinstance(caught.value.__cause__, Unpicklable)
    assert "still runs" not in str(caught.value)


def test_each_thread_has_its_own_error_message() -> None:
    def fail_in_its_own_way(comm: xccl.Communicator) -> None:
        for _ in range(200):
            with pytest.raises(xccl.XcclUsageError, match=f"rank {1000 + comm.rank} "):
                comm.send(np.zeros(1), 1000 + comm.rank)

    run(fail_in_its_own_way, 4)


def test_ranks_that_do_not_finish_in_time_are_named_and_ended() -> None:
    def hang(comm: xccl.Communicator) -> None:
        if comm.rank > 0:
            comm.recv(np.zeros(1), 3 - comm.rank)

    with pytest.raises(xccl.XcclTimeout, match=r"2 of 3 ranks did not finish in 0.5 s") as caught:
        run(hang, 3, timeout=0.5)
    assert "rank 1: operation" in str(caught.value)
    assert "(recv)" in str(caught.value)
    assert "still runs" not in str(caught.value)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("xccl rank")]


def test_a_thread_that_cannot_be_ended_is_reported_with_its_place() -> None:
    release = threading.Event()

    def block_elsewhere(comm: xccl.Communicator) -> None:
        if comm.rank == 2:
            release.wait()
        else:
            raise ValueError(comm.rank)

    try:
        with pytest.raises(xccl.XcclAborted, match=r"rank [01] raised") as caught:
            run(block_elsewhere, 3)
        assert "1 threads did not end within 2.0 s" in str(caught.value)
        assert "rank 2 still runs, in wait at" in str(caught.value)
    finally:
        release.set()
        for thread in threading.enumerate():
            if thread.name.startswith("xccl rank"):
                thread.join()


def test_a_wait_in_one_rank_does_not_hold_up_the_others() -> None:
    """A rank that waits in C does not hold the interpreter lock."""

    def wait_or_work(comm: xccl.Communicator) -> int:
        flag = comm.signal()
        if comm.rank == 0:
            return int(comm.wait_until(flag, ">=", 1000))
        for _ in range(1000):
            comm.signal_op(flag, 1, 0, op="add")
        time.sleep(0.05)
        return 0

    assert run(wait_or_work, 2)[0] >= 1000


def test_init_inside_a_thread_is_a_world_of_its_own() -> None:
    def init_inside(comm: xccl.Communicator) -> int:
        with xccl.init() as alone:
            return alone.size

    assert run(init_inside, 2) == [1, 1]


@pytest.mark.parametrize(("keywords", "text"), [({"host": "fibers"}, "host is"), ({"logs": "x"}, "logs= needs")])
def test_bad_arguments_are_refused(keywords: dict[str, str], text: str) -> None:
    with pytest.raises(xccl.XcclUsageError, match=text):
        xccl.run(lambda comm: None, 2, **{"host": "threads", **keywords})  # type: ignore[arg-type]
