"""The operations, by name. A new one is a file here with a record, and its place below."""

from __future__ import annotations

from xccl.bench.operation import Operation
from xccl.bench.operations import (
    a2e,
    all_gather,
    all_reduce,
    all_to_all,
    all_to_all_v,
    bandwidth,
    barrier,
    broadcast,
    combine,
    dispatch,
    e2a,
    get,
    ma_layer,
    moe,
    put,
    put_signal,
    reduce_scatter,
    send,
)

OPERATIONS: dict[str, Operation] = {
    module.OPERATION.name: module.OPERATION
    for module in (
        put,
        get,
        put_signal,
        send,
        bandwidth,
        barrier,
        broadcast,
        all_gather,
        all_reduce,
        reduce_scatter,
        all_to_all,
        all_to_all_v,
        dispatch,
        combine,
        moe,
        a2e,
        e2a,
        ma_layer,
    )
}
