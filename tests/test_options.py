"""The options table: environment, rc, and refusals."""

from __future__ import annotations

import pytest

import xccl
from xccl.options import OPTIONS, check_environment, options_text


def test_rc_overrides_environment_overrides_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert xccl.rc.timeout == 300.0
    monkeypatch.setenv("XCCL_TIMEOUT", "20")
    assert xccl.rc.timeout == 20.0
    xccl.rc.timeout = 7
    try:
        assert xccl.rc.timeout == 7.0
    finally:
        del xccl.rc.timeout
    assert xccl.rc.timeout == 20.0


@pytest.mark.parametrize(("text", "number"), [("4096", 4096), ("64K", 65536), ("2m", 2 << 20), ("1G", 1 << 30)])
def test_bytes_have_suffixes(text: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XCCL_HEAP_SIZE", text)
    assert xccl.rc.heap_size == number


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("XCCL_TIMEOUT", "soon"),
        ("XCCL_TIMEOUT", "-1"),
        ("XCCL_TIMEOUT", "nan"),
        ("XCCL_HEAP_SIZE", "1X"),
        ("XCCL_SPIN", "1.5"),
    ],
)
def test_bad_values_are_refused(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(xccl.XcclUsageError, match=rf"{variable} .*takes .*got '{value}'"):
        xccl.init()


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(xccl.XcclUsageError, match="no option 'timeuot'; there are"):
        xccl.rc.timeuot = 3
    monkeypatch.setenv("XCCL_TIMEUOT", "3")
    with pytest.raises(xccl.XcclUsageError, match="unknown variable XCCL_TIMEUOT"):
        check_environment()


def test_slots_must_be_a_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XCCL_P2P_SLOTS", "6")
    with pytest.raises(xccl.XcclUsageError, match="power of two, got 6"):
        xccl.init()


def test_the_printed_table_has_every_option() -> None:
    text = options_text()
    assert all(option.variable in text and option.help in text for option in OPTIONS)


def test_the_default_deadline_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XCCL_TIMEOUT", "0.05")
    with xccl.init() as comm, pytest.raises(xccl.XcclTimeout):
        comm.wait_until(comm.signal(), "==", 1)
    with xccl.init(timeout=0.02) as comm, pytest.raises(xccl.XcclTimeout):
        comm.wait_until(comm.signal(), "==", 1)
