"""The public API has the names and keywords of the contract, and each public object says what it does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import numpy as np
import pytest

import xccl

# Every name that users may rely on, with its parameters; more may be added as keywords. "*" begins keywords.
SIGNATURES = {
    "init": "comm * timeout",
    "run": "fn nranks *args timeout",
    "Communicator.close": "",
    "Communicator.split": "color key",
    # address space
    "Communicator.zeros": "shape dtype",
    "Communicator.empty": "shape dtype",
    "Communicator.full": "shape fill_value dtype",
    "Communicator.array": "obj",
    "Communicator.free": "a",
    "Communicator.ptr": "a pe",
    "Communicator.local_read": "a",
    "Communicator.local_write": "a",
    "Communicator.put": "dst src pe",
    "Communicator.get": "dst src pe",
    "Communicator.signal": "n",
    "Communicator.put_signal": "dst src pe * signal value op",
    "Communicator.signal_op": "signal value pe * op",
    "Communicator.wait_until": "signal cmp value * timeout",
    "Communicator.fence": "",
    "Communicator.quiet": "",
    "Communicator.atomic_fetch": "target pe",
    "Communicator.atomic_fetch_add": "target value pe",
    "Communicator.atomic_swap": "target value pe",
    "Communicator.atomic_compare_swap": "target compare value pe",
    # point to point
    "Communicator.send": "buf dest tag * mode timeout",
    "Communicator.recv": "buf source tag * timeout",
    "Communicator.isend": "buf dest tag * mode",
    "Communicator.irecv": "buf source tag",
    "Request.wait": "timeout",
    "Request.test": "",
    # collectives
    "Communicator.barrier": "* timeout",
    "Communicator.broadcast": "buf root * out timeout",
    "Communicator.all_gather": "x * out timeout",
    "Communicator.all_reduce": "x op * out timeout",
    "Communicator.reduce_scatter": "x op * out timeout",
    "Communicator.all_to_all": "x * out timeout",
    "Communicator.all_to_all_v": "x send_counts recv_counts * out timeout",
    # MoE
    "ExpertParallel": "comm num_experts hidden num_topk num_max_tokens_per_rank dtype quant expert_map",
    "ExpertParallel.dispatch": "x topk_idx topk_weights * out dequantize timeout",
    "ExpertParallel.combine": "y handle topk_weights * out on_missing timeout",
    "ExpertParallel.dispatch_async": "x topk_idx topk_weights * out dequantize timeout",
    "ExpertParallel.combine_async": "y handle topk_weights * out timeout",
    "ExpertParallel.set_alive": "mask * timeout",
    "ExpertParallel.expert_map_on": "comm",
    "ExpertParallel.buffer_bytes": "",
    "AttentionExpert": "comm attention_ranks expert_ranks num_experts hidden num_topk num_max_tokens_per_rank",
    "AttentionExpert.a2e": "x topk_idx topk_weights",
    "AttentionExpert.e2a": "* out timeout",
    "AttentionExpert.a2e_recv": "* domain out dequantize timeout",
    "AttentionExpert.e2a_send": "y handle * timeout",
    "AttentionExpert.e2a_async": "",
    "AttentionExpert.a2e_recv_async": "",
    "AttentionExpert.e2a_send_async": "y handle",
    "AttentionExpert.buffer_bytes": "",
    "reference.dispatch": "",
    "reference.combine": "",
    "reference.a2e": "",
    "reference.e2a": "",
}

ERRORS = {
    "XcclError": Exception,
    "XcclUsageError": ValueError,
    "XcclTimeout": TimeoutError,
    "XcclPeerLost": xccl.XcclError,
    "XcclMissingExperts": xccl.XcclError,
    "XcclAborted": xccl.XcclError,
    "XcclOutOfMemory": MemoryError,
}


def find(path: str) -> Any:
    found: Any = xccl
    for name in path.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", SIGNATURES)
def test_has_the_parameters_of_the_contract(path: str) -> None:
    parameters = dict(inspect.signature(find(path)).parameters)
    parameters.pop("self", None)
    positional, _, keywords = SIGNATURES[path].partition("*" if "*args" not in SIGNATURES[path] else "*args")
    listed = list(parameters)
    assert listed[: len(positional.split())] == positional.split()
    assert set(keywords.split()) <= set(listed)


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_the_exceptions_that_callers_expect(name: str) -> None:
    error = getattr(xccl, name)
    assert issubclass(error, xccl.XcclError)
    assert issubclass(error, ERRORS[name])


@pytest.mark.parametrize("name", ["ANY_SOURCE", "ANY_TAG", "rc", "Signal", "Handle", "Request", "reference"])
def test_exports(name: str) -> None:
    assert hasattr(xccl, name)
    assert name in xccl.__all__


def test_communicator_knows_its_place() -> None:
    with xccl.init() as comm:
        assert (comm.rank, comm.size) == (0, 1)
        a = comm.zeros((2, 3), "float32")
    assert a.dtype == np.float32


def public_objects() -> Iterator[tuple[str, Any]]:
    """Every exported object, and the public members of exported classes and modules that are ours."""
    for name in xccl.__all__:
        found = getattr(xccl, name)
        if inspect.ismodule(found):
            yield name, found
            own = {n: f for n, f in vars(found).items() if getattr(f, "__module__", None) == found.__name__}
            yield from ((f"{name}.{n}", f) for n, f in own.items() if not n.startswith("_"))
        elif inspect.isclass(found):
            yield name, found
            ours = [base for base in found.__mro__ if base.__module__.startswith("xccl")]
            members = {n: getattr(found, n) for base in ours for n, f in vars(base).items() if is_api(n, f)}
            yield from ((f"{name}.{n}", f) for n, f in members.items())
        elif callable(found):
            yield name, found


def is_api(name: str, member: Any) -> bool:
    return not name.startswith("_") and isinstance(member, (FunctionType, staticmethod, classmethod, property))


@pytest.mark.parametrize(
    ("name", "found"), list(public_objects()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_says_what_it_does(name: str, found: Any) -> None:
    text = inspect.getdoc(found)
    assert text, f"xccl.{name} has no docstring"
    first = text.splitlines()[0]
    assert len(first) >= 15, f"xccl.{name}: the first line must say what it does, got {first!r}"
    assert first.rstrip()[-1] in ".:", f"xccl.{name}: the first line must be a sentence, got {first!r}"
