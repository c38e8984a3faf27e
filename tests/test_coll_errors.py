"""What collectives refuse, and that a call that differs between ranks is an error that names it, never a hang."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from coll_cases import same_bits, values
from support import ranks

import xccl
from xccl import XcclTimeout, XcclUsageError
from xccl._binding import ffi, lib

LONG = 40000  # float64: several chunks of the staging blocks, or in place


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XCCL_COLL_BLOCK_SIZE", "64K")


def _group(comm: xccl.Communicator) -> xccl.Communicator:
    """All ranks again: may become unusable, while the world stays whole."""
    group = comm.split(0)
    assert group is not None
    return group


# ---- arguments: refused at once, on this rank alone, and the communicator stays usable ----


def _calls_with_bad_arguments(comm: xccl.Communicator) -> list[tuple[str, Callable[[], Any]]]:
    n = comm.size
    x, rows, read_only = np.zeros(4 * n), np.zeros((2 * n, 3)), np.zeros(4 * n)
    read_only.flags.writeable = False
    return [
        (r"all_to_all: axis 0 of x must be divisible.* 3; got shape \(13,\)", lambda: comm.all_to_all(np.zeros(13))),
        (r"reduce_scatter: axis 0 of x must be .*got shape \(\)", lambda: comm.reduce_scatter(np.array(1.0))),
        ("all_gather: x must be a NumPy array, got list", lambda: comm.all_gather([1, 2])),  # type: ignore[arg-type]
        ("all_reduce: x must be C-contiguous", lambda: comm.all_reduce(rows.T)),
        ("all_reduce: x has dtype object", lambda: comm.all_reduce(np.array([None]))),
        ("all_reduce: op is one of .*, got 'mean'", lambda: comm.all_reduce(x, "mean")),  # type: ignore[arg-type]
        ("all_reduce: op 'sum' is not defined for dtype bool", lambda: comm.all_reduce(x > 0)),
        ("reduce_scatter: op 'max' is not defined for dtype complex128", lambda: comm.reduce_scatter(x + 1j, "max")),
        (r"all_reduce: out must be float64\[12\], got float32", lambda: comm.all_reduce(x, out=np.zeros(12, "f4"))),
        (r"all_gather: out must be float64\[3, 12\], got float64\[12\]", lambda: comm.all_gather(x, out=x)),
        ("all_to_all: out is read-only", lambda: comm.all_to_all(x, out=read_only)),
        ("all_to_all on rank .*overlap", lambda: comm.all_to_all(x, out=x)),
        ("reduce_scatter on rank .*overlap", lambda: comm.reduce_scatter(x, out=x[:4])),
        ("all_reduce on rank .*overlap", lambda: comm.all_reduce(x[:10], out=x[1:11])),
        ("all_gather on rank .*overlap", lambda: comm.all_gather(rows[(comm.rank + 1) % n], out=rows[:n])),
        ("broadcast: root is a rank from 0 to 2, got 3", lambda: comm.broadcast(x, 3)),
        ("broadcast: buf is read-only", lambda: comm.broadcast(read_only, (comm.rank + 1) % n)),
        ("send_counts sum up to 11 rows, but x has 12", lambda: comm.all_to_all_v(x, [4, 4, 3])),
        ("send_counts must be 3 integers, one per rank; got int64.2.", lambda: comm.all_to_all_v(x, [6, 6])),
        ("recv_counts.1. is -1", lambda: comm.all_to_all_v(x, [4, 4, 4], [4, -1, 4])),
        ("to itself and expects", lambda: comm.all_to_all_v(x, [4, 4, 4], [3, 3, 3])),
        ("at least one axis", lambda: comm.all_to_all_v(np.array(1.0), [1, 0, 0])),
        ("timeout= is a number of seconds", lambda: comm.all_reduce(x, timeout=-1.0)),
    ]


@ranks(3)
def test_bad_arguments_are_named(comm: xccl.Communicator) -> None:
    for message, call in _calls_with_bad_arguments(comm):
        with pytest.raises(XcclUsageError, match=message):
            call()
        assert comm.all_reduce(np.array([comm.rank])).tolist() == [3]


# ---- calls that differ ----


def _pairs(comm: xccl.Communicator) -> dict[str, tuple[Callable[[xccl.Communicator], Any], ...]]:
    """What most ranks call, what one rank calls, for each way to differ."""
    symmetric = comm.zeros(3 * LONG)
    short, long = np.zeros(3), np.zeros(3 * LONG)
    return {
        "size": (lambda c: c.all_to_all(short), lambda c: c.all_to_all(np.zeros(6))),
        "short and long": (lambda c: c.all_to_all(short), lambda c: c.all_to_all(long)),
        "long and short": (lambda c: c.all_reduce(long), lambda c: c.all_reduce(short)),
        "long sizes": (lambda c: c.all_gather(long), lambda c: c.all_gather(long[:-1])),
        "long sizes in place": (lambda c: c.all_gather(symmetric), lambda c: c.all_gather(symmetric[:-1])),
        "dtype": (lambda c: c.all_gather(short), lambda c: c.all_gather(short.view(np.int64))),
        "reduction": (lambda c: c.all_reduce(short, "sum"), lambda c: c.all_reduce(short, "max")),
        "long reduction": (lambda c: c.all_reduce(symmetric, "sum"), lambda c: c.all_reduce(symmetric, "max")),
        "operation": (lambda c: c.all_gather(short), lambda c: c.barrier()),
        "long operation": (lambda c: c.all_reduce(long), lambda c: c.reduce_scatter(long)),
        "broadcast here": (lambda c: c.all_gather(short), lambda c: c.broadcast(short, 0)),
        "broadcast there": (lambda c: c.broadcast(short, 2), lambda c: c.all_gather(short)),
        "broadcast size": (lambda c: c.broadcast(long, 2), lambda c: c.broadcast(short, 2)),
        "broadcast in place": (lambda c: c.broadcast(symmetric, 2), lambda c: c.broadcast(symmetric[1:], 2)),
        "root": (lambda c: c.broadcast(symmetric, 2), lambda c: c.broadcast(symmetric, 0)),
        "rows": (
            lambda c: c.all_to_all_v(np.zeros((3, 2)), [1, 1, 1]),
            lambda c: c.all_to_all_v(np.zeros((3, 4)), [1, 1, 1]),
        ),
        "received counts": (
            lambda c: c.all_to_all_v(long, [LONG] * 3),
            lambda c: c.all_to_all_v(long, [LONG] * 3, [LONG, LONG, LONG - 1]),
        ),
    }


def _both(group: xccl.Communicator, call: Callable[[xccl.Communicator], Any]) -> None:
    call(group)
    group.barrier()


@ranks(3)
def test_the_rank_that_differs_is_named_everywhere(comm: xccl.Communicator) -> None:
    odd = 1
    for name, (usual, other) in _pairs(comm).items():
        group = _group(comm)
        start = time.monotonic()
        with pytest.raises(XcclUsageError, match="do not agree") as caught:
            # a root that needs no answer sees it in the next operation
            _both(group, other if comm.rank == odd else usual)
        text = str(caught.value)
        assert ("rank 1 is in" in text) == (comm.rank != odd) or "found a call" in text, (name, text)
        assert time.monotonic() - start < 20, name
        with pytest.raises(XcclUsageError, match=r"(?i)unusable|broken|failed"):
            group.barrier()
    assert comm.all_reduce(np.array([1])).tolist() == [3]


@ranks(2)
def test_the_message_tells_got_and_expected(comm: xccl.Communicator) -> None:
    x = np.zeros(4 if comm.rank == 0 else 6, np.float32)
    group = _group(comm)
    with pytest.raises(XcclUsageError) as caught:
        group.all_reduce(x, "sum" if comm.rank == 0 else "max")
    text = str(caught.value)
    ours, theirs = ("sum", "max") if comm.rank == 0 else ("max", "sum")
    peer = 1 - comm.rank
    assert f"all_reduce on rank {comm.rank} of 2" in text
    assert f"rank {peer} is in collective 1: all_reduce({theirs}) of float32, message of" in text
    assert f"expected collective 1: all_reduce({ours}) of float32, message of" in text


@ranks(2)
def test_a_message_of_another_length_than_expected(comm: xccl.Communicator) -> None:
    group = _group(comm)
    expected = "message of 8 bytes.* expected collective 1: all_to_all_v with rows of 8 bytes of float64, message of 16"
    send = [2, 1] if comm.rank == 0 else [1, 2]
    if comm.rank == 1:
        with pytest.raises(XcclUsageError, match=expected):
            group.all_to_all_v(np.zeros(3), send, [2, 2])
    else:
        group.all_to_all_v(np.zeros(3), send, [2, 1])


@ranks(3)
def test_a_missing_rank_is_named_after_the_deadline(comm: xccl.Communicator) -> None:
    group = _group(comm)
    if comm.rank != 1:
        for x in (np.zeros(3), np.zeros(3 * LONG)):
            with pytest.raises((XcclTimeout, XcclUsageError), match=r"of rank 1|unusable|broken|failed"):
                group.all_to_all(x, timeout=0.3)
    comm.barrier()


@ranks(2)
def test_a_collective_cannot_start_inside_all_to_all_v(comm: xccl.Communicator) -> None:
    """In Python the two halves are one call; C programs may begin and finish."""
    group, x, got = _group(comm), np.arange(4.0), ffi.new("uint64_t[2]")
    send, default = ffi.new("uint64_t[]", [16, 16]), lib.XCCL_TIMEOUT_DEFAULT
    begun = lib.xccl_coll_all_to_all_v_begin(
        group._handle(), ffi.from_buffer(x), send, 8, lib.XCCL_FLOAT64, default, got
    )
    assert (begun, list(got)) == (lib.XCCL_OK, [16, 16])
    with pytest.raises(XcclUsageError, match="begun and not finished"):
        group.barrier()
    out = np.empty(4)
    assert lib.xccl_coll_all_to_all_v_finish(group._handle(), default, ffi.from_buffer(out)) == lib.XCCL_OK
    assert out.tolist() == x.reshape(2, 2)[comm.rank].tolist() * 2
    group.barrier()


# ---- sizes ----


@ranks(2, timeout=120)
def test_more_than_two_gibibytes(comm: xccl.Communicator) -> None:
    """One byte in 64 MiB is looked at: the message is longer than 32 bits can count."""
    count, step = (2 << 30) + 12345, 64 << 20
    buf = np.zeros(count, np.uint8)
    if comm.rank == 0:
        buf[::step] = np.arange(len(buf[::step])) + 1
        buf[-1] = 77
    comm.broadcast(buf, 0)
    assert buf[::step].tolist() == list(range(1, len(buf[::step]) + 1))
    assert buf[-1] == 77
    assert np.count_nonzero(buf[-1000:]) == 1


@ranks(2)
def test_every_16_bit_float_survives(comm: xccl.Communicator) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    for name in ("float16", "bfloat16"):
        x = patterns.view(values(0, 0, (0,), name).dtype)
        number = x[~np.isnan(x.astype(np.float32))]
        assert same_bits(comm.all_reduce(number, "max"), number)
        zero = np.zeros_like(number) if comm.rank == 1 else number
        assert (comm.all_reduce(zero) == number).all()


@ranks(1, 3)
def test_a_refused_out_of_all_to_all_v_keeps_the_ranks_in_step(comm: xccl.Communicator) -> None:
    """Its size is known only when the counts have come: by then the peers' rows are on their way."""
    x, counts = np.arange(comm.size * 20000, dtype=np.int64), [20000] * comm.size
    if comm.rank == 0:
        with pytest.raises(xccl.XcclUsageError, match=r"out must be int64\[\d+\], got int64\[1\]"):
            comm.all_to_all_v(x, counts, out=np.empty(1, np.int64))
    else:
        comm.all_to_all_v(x, counts)
    assert comm.all_to_all_v(x, counts).tolist() == (x.reshape(comm.size, -1)[comm.rank].tolist() * comm.size)
