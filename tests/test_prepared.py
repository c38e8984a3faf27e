"""Prepared operations: the same as the plain ones, call for call."""

from __future__ import annotations

import gc
import inspect

import ml_dtypes
import numpy as np
import pytest
from support import ranks

import xccl
from xccl.communicator import PREPARABLE


@ranks(1, 2, 3, 8)
def test_prepared_collectives_give_what_the_plain_ones_give(comm: xccl.Communicator) -> None:
    for dtype in ("int32", "float64", ml_dtypes.bfloat16):
        for count in (1, 3000):
            x = comm.empty((comm.size, count), dtype) if count > 1 else np.empty((comm.size, count), dtype)
            operations = {name: comm.prepare(name, x) for name in ("all_to_all", "all_gather", "reduce_scatter")}
            operations["all_reduce"] = comm.prepare("all_reduce", x, "max")
            barrier = comm.prepare("barrier")
            for turn in range(3):
                x[...] = (np.arange(x.size).reshape(x.shape) % 13 + comm.rank + turn).astype(dtype)
                for name, operation in operations.items():
                    plain = getattr(comm, name)(x, *(["max"] if name == "all_reduce" else []))
                    assert operation().tobytes() == plain.tobytes(), name
                barrier()


@ranks(2, 3)
def test_prepared_messages_arrive(comm: xccl.Communicator) -> None:
    a, b = np.zeros(5), np.zeros(5)
    send = comm.prepare("send", a, (comm.rank + 1) % comm.size, 7)
    recv = comm.prepare("recv", b, xccl.ANY_SOURCE, xccl.ANY_TAG)
    for turn in range(20):
        a[...] = turn + comm.rank
        send()
        message = recv()
        assert message == ((comm.rank - 1) % comm.size, 7, 40)
        assert (b == turn + message.source).all()


@ranks(2)
def test_prepared_puts_keep_their_arrays_alive(comm: xccl.Communicator) -> None:
    a, signal = comm.zeros((), "int64"), comm.signal()
    source = np.array(comm.rank + 5)
    put = comm.prepare("put_signal", a, source, 1 - comm.rank, signal=signal, value=1, op="add")
    del source
    gc.collect()
    for turn in range(1, 4):
        put()
        comm.wait_until(signal, ">=", turn)
        assert a == 6 - comm.rank


def test_what_cannot_be_prepared_is_refused() -> None:
    comm = xccl.init()
    x = np.zeros(4)
    with pytest.raises(xccl.XcclUsageError, match=r"operation is one of barrier, .*got 'split'"):
        comm.prepare("split", 1)
    with pytest.raises(xccl.XcclUsageError, match="must be C-contiguous"):
        comm.prepare("all_to_all", x[::2])
    operations = [comm.prepare("barrier"), comm.prepare("all_reduce", x)]
    comm.close()
    for operation in operations:
        with pytest.raises(xccl.XcclUsageError, match="closed"):
            operation()


def test_every_preparable_operation_is_a_method_with_the_same_arguments() -> None:
    for name in PREPARABLE:
        public = inspect.signature(getattr(xccl.Communicator, name))
        assert public.parameters == inspect.signature(getattr(xccl.Communicator, f"_{name}")).parameters, name
