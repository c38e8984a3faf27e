"""Runs test functions on many ranks, and checks that nothing is left behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def _shared_objects() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("xccl")}


def _children() -> set[int]:
    own = os.getpid()
    children = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            if parent == own:
                children.add(int(entry.name))
    return children


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Every test leaves shared memory, the process table and the processor's arithmetic as they were."""
    objects, children = _shared_objects(), _children()
    yield
    assert _shared_objects() <= objects, "a test left a shared object in /dev/shm"
    assert _children() <= children, "a test left a child process"
    assert sys.float_info.min / 2 != 0, "a test left denormals switched off: later tests compute other bits"


@pytest.fixture
def rings_of_512_kib(monkeypatch: pytest.MonkeyPatch) -> None:
    """All messages go through rings of a known length, for tests that fill them. It follows the caches otherwise."""
    monkeypatch.setenv("XCCL_P2P_SLOTS", "8")
    monkeypatch.setenv("XCCL_CMA", "off")
