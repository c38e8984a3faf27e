"""Collectives against NumPy: every operation, dtype, kind of memory, and size around each change of path."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from coll_cases import DTYPES, FLOATS, INTEGERS, Buffers, reduced, same_bits, values
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ranks

import xccl

Case = Callable[[xccl.Communicator, int, str, int, Buffers, Buffers], None]

# Elements per message. With blocks of 64 KB (see small_blocks): one line, more lines, the end of inline messages at
# 4 KB, staged, read in place from 64 KB on, one block, several blocks.
SIZES = {1: [0, 1, 7, 40, 41, 4096, 4097, 65537], 8: [1, 5, 6, 512, 513, 3000, 8192, 8193, 40000]}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks without much data."""
    monkeypatch.setenv("XCCL_COLL_BLOCK_SIZE", "64K")


def all_to_all(comm: xccl.Communicator, turn: int, name: str, count: int, source: Buffers, target: Buffers) -> None:
    n = comm.size
    every = [values(rank, turn, (n, count), name) for rank in range(n)]
    x = source.filled(every[comm.rank])
    expected = np.stack([every[rank][comm.rank] for rank in range(n)])
    assert same_bits(comm.all_to_all(x), expected)
    out = target.array(x.shape, name)
    assert comm.all_to_all(x, out=out) is out
    assert same_bits(out, expected)
    assert same_bits(x, every[comm.rank])


def all_gather(comm: xccl.Communicator, turn: int, name: str, count: int, source: Buffers, target: Buffers) -> None:
    every = np.stack([values(rank, turn, (count,), name) for rank in range(comm.size)])
    x = source.filled(every[comm.rank])
    assert same_bits(comm.all_gather(x), every)
    out = target.array(every.shape, name)
    out[comm.rank] = x
    assert comm.all_gather(out[comm.rank], out=out) is out
    assert same_bits(out, every)


def broadcast(comm: xccl.Communicator, turn: int, name: str, count: int, source: Buffers, target: Buffers) -> None:
    for root in range(comm.size):
        expected = values(root, turn, (count,), name)
        buf = source.filled(values(comm.rank, turn, (count,), name))
        out = target.array(buf.shape, name)
        assert comm.broadcast(buf, root, out=out) is out
        assert same_bits(out, expected)
        assert comm.broadcast(buf, root) is buf
        assert same_bits(buf, expected)


def all_to_all_v(comm: xccl.Communicator, turn: int, name: str, count: int, source: Buffers, target: Buffers) -> None:
    n, me = comm.size, comm.rank
    counts = np.random.default_rng(turn).integers(0, count + 1, (n, n)) * (np.arange(n * n).reshape(n, n) % 3 > 0)
    every = [values(rank, turn, (int(counts[rank].sum()), 2), name) for rank in range(n)]
    starts = [np.concatenate([[0], np.cumsum(counts[rank])]) for rank in range(n)]
    x = source.filled(every[me])
    expected = np.concatenate([every[rank][starts[rank][me] : starts[rank][me + 1]] for rank in range(n)])
    assert same_bits(comm.all_to_all_v(x, counts[me].tolist()), expected)
    out = target.array(expected.shape, name)
    assert comm.all_to_all_v(x, counts[me], counts[:, me] if me % 2 == 0 else None, out=out) is out
    assert same_bits(out, expected)


def _check_moves(comm: xccl.Communicator, case: Case, symmetric: tuple[bool, bool]) -> None:
    room = 2 * comm.size * 40000 * 8
    source, target = (Buffers(comm, room, kind) for kind in symmetric)
    turn = 0
    for itemsize, counts in SIZES.items():
        for count in counts:
            turn += 1
            case(comm, turn, "float64" if itemsize == 8 else "int8", count, source, target)
            source.check_sentinels()
            target.check_sentinels()
    for turn, name in enumerate(DTYPES):
        case(comm, turn, name, 33, source, target)
    source.free()
    target.free()


KINDS = [(False, False), (True, True), (True, False), (False, True)]


@pytest.mark.parametrize("case", [all_to_all, all_gather, broadcast, all_to_all_v])
@ranks(1, 2, 3, 5, 8, timeout=120)
def test_moves_the_right_bytes(comm: xccl.Communicator, case: Case) -> None:
    for symmetric in KINDS[:2] if comm.size > 3 else KINDS:
        _check_moves(comm, case, symmetric)


@ranks(2, 3, timeout=120)
def test_members_may_differ_in_where_their_arrays_lie(comm: xccl.Communicator) -> None:
    symmetric, ordinary = Buffers(comm, 1 << 20, True), Buffers(comm, 1 << 20, False)
    source, target = (symmetric, ordinary) if comm.rank % 2 == 0 else (ordinary, symmetric)
    for case in (all_to_all, all_gather, broadcast, all_to_all_v, all_reduce, reduce_scatter):
        for turn, count in enumerate([8192, 20000]):
            case(comm, turn, "float64", count, source, target)


def all_reduce(comm: xccl.Communicator, turn: int, name: str, count: int, source: Buffers, target: Buffers) -> None:
    every = [values(rank, turn, (count,), name) for rank in range(comm.size)]
    for op in ("min", "max") if name == "bool" else ("sum", "min", "max", "prod"):
        expected = reduced(every, op)
        x = source.filled(every[comm.rank])
        assert same_bits(comm.all_reduce(x, op), expected)
        out = target.array(x.shape, name)
        assert comm.all_reduce(x, op, out=out) is out
        assert same_bits(out, expected)
        assert same_bits(x, every[comm.rank])
        assert comm.all_reduce(x, op, out=x) is x
        assert same_bits(x, expected)


def reduce_scatter(comm: xccl.Communicator, turn: int, name: str, count: int, source: Buffers, target: Buffers) -> None:
    every = [values(rank, turn, (comm.size * count,), name) for rank in range(comm.size)]
    part = slice(comm.rank * count, (comm.rank + 1) * count)
    for op in ("min", "max") if name == "bool" else ("sum", "min", "max", "prod"):
        expected = reduced(every, op)[part]
        x = source.filled(every[comm.rank])
        assert same_bits(comm.reduce_scatter(x, op), expected)
        out = target.array(expected.shape, name)
        assert comm.reduce_scatter(x, op, out=out) is out
        assert same_bits(out, expected)


@pytest.mark.parametrize("case", [all_reduce, reduce_scatter])
@ranks(1, 2, 3, 5, 8, timeout=120)
def test_reduces_in_rank_order(comm: xccl.Communicator, case: Case) -> None:
    for symmetric in KINDS[:2] if comm.size > 3 else KINDS:
        source, target = (Buffers(comm, comm.size * 40000 * 8, kind) for kind in symmetric)
        for turn, count in enumerate(SIZES[8]):
            case(comm, turn, "float64", count, source, target)
            source.check_sentinels()
            target.check_sentinels()
        for turn, name in enumerate([*FLOATS, *INTEGERS, "bool"]):
            for count in (0, 33, 5000):
                case(comm, turn, name, count, source, target)
        source.free()
        target.free()


@ranks(2, 5)
def test_nan_makes_min_and_max_nan(comm: xccl.Communicator) -> None:
    for name in FLOATS:
        for holder in range(comm.size):
            x = values(comm.rank, holder, (3,), name)
            if comm.rank == holder:
                x[1] = np.nan
            for op in ("min", "max"):
                assert np.isnan(comm.all_reduce(x, op).astype(np.float64)).tolist() == [False, True, False]


@ranks(4)
def test_result_does_not_depend_on_the_algorithm(comm: xccl.Communicator) -> None:
    long = values(comm.rank, 1, (30000,), "float32")
    whole = comm.all_reduce(long)
    for start in range(0, 30000, 1000):
        assert same_bits(comm.all_reduce(long[start : start + 1000].copy()), whole[start : start + 1000])
    scattered = comm.reduce_scatter(long)
    assert same_bits(comm.all_gather(scattered).reshape(-1), whole)


@ranks(1, 3)
def test_shapes(comm: xccl.Communicator) -> None:
    n = comm.size
    assert comm.all_gather(np.array(comm.rank)).tolist() == list(range(n))
    assert comm.all_gather(np.ones((2, 3))).shape == (n, 2, 3)
    assert comm.all_reduce(np.ones((2, 3))).tolist() == np.full((2, 3), float(n)).tolist()
    assert comm.reduce_scatter(np.ones((2 * n, 3), np.int32)).tolist() == np.full((2, 3), n).tolist()
    assert comm.all_to_all(np.ones((2 * n, 3, 4))).shape == (2 * n, 3, 4)
    assert comm.all_to_all(np.ones((n, 0))).shape == (n, 0)
    assert comm.all_to_all_v(np.ones((n, 0)), [1] * n).shape == (n, 0)
    assert comm.all_to_all_v(np.ones((0, 4)), [0] * n, [0] * n).shape == (0, 4)


@ranks(3)
def test_any_other_dtype_is_moved(comm: xccl.Communicator) -> None:
    record = np.dtype([("a", "i4"), ("b", "f8"), ("c", "S3")])
    x = np.array([(comm.rank, comm.rank / 2, b"x")] * 3, record)
    assert comm.all_gather(x)["a"][:, 0].tolist() == [0, 1, 2]
    assert comm.all_to_all(x)["b"].tolist() == [0.0, 0.5, 1.0]
    big_endian = np.full(3, comm.rank, ">i4")
    assert comm.all_to_all(big_endian).tolist() == [0, 1, 2]


@ranks(3, 8)
def test_all_ranks_see_what_was_written_before_a_barrier(comm: xccl.Communicator) -> None:
    cells = comm.zeros(comm.size, np.int64)
    for turn in range(1, 200):
        for pe in range(comm.size):
            comm.ptr(cells, pe)[comm.rank] = turn
        comm.barrier()
        assert (cells == turn).all()
        comm.barrier()


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_random_sequences(data: st.DataObject) -> None:
    """Any sequence of operations of any sizes: nothing of one operation leaks into another."""
    nranks = data.draw(st.integers(1, 6))
    operation = st.sampled_from([all_to_all, all_gather, broadcast, all_to_all_v, all_reduce, reduce_scatter])
    size = st.one_of(st.integers(0, 20), st.integers(0, 2000), st.integers(0, 30000))
    steps = data.draw(st.lists(st.tuples(operation, size, st.booleans()), min_size=1, max_size=8))

    def body(comm: xccl.Communicator) -> None:
        memory = {kind: (Buffers(comm, 4 << 20, kind), Buffers(comm, 4 << 20, kind)) for kind in (False, True)}
        for turn, (case, count, symmetric) in enumerate(steps):
            case(comm, turn, "float32", count, *memory[symmetric])

    xccl.run(body, nranks, timeout=60)
