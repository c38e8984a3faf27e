"""The copies of large buffers: every alignment, every length around the borders of their loops."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cffi import FFI
from hypothesis import given, settings
from hypothesis import strategies as st

CSRC = Path(__file__).parents[1] / "csrc"
MARGIN = 64

ffi = FFI()
ffi.cdef("""
    void xccl_copy(void *to, const void *from, uint64_t bytes);
    void xccl_copy_streaming(void *to, const void *from, uint64_t bytes);
    uint64_t xccl_copy_streaming_bytes(int ranks);
""")


@pytest.fixture(scope="session")
def lib(tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = tmp_path_factory.mktemp("copy") / "copy.so"
    flags = ["-std=gnu11", "-O3", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(
        [os.environ.get("CC", "cc"), *flags, str(CSRC / "copy.c"), str(CSRC / "cache.c"), "-o", str(library)],
        check=True,
    )
    return ffi.dlopen(str(library))


LENGTHS = st.one_of(
    st.integers(0, 300), st.integers(2048 - 70, 2048 + 200), st.integers(0, 200).map(lambda d: 16384 + d - 100)
)


@pytest.mark.parametrize("streaming", [False, True])
@settings(deadline=None, max_examples=500)
@given(nbytes=LENGTHS, to=st.integers(0, 70), source=st.integers(0, 70), seed=st.integers(0, 2**32 - 1))
def test_should_copy_exactly_the_bytes(lib: Any, streaming: bool, nbytes: int, to: int, source: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    origin = rng.integers(0, 256, nbytes + source + MARGIN, dtype=np.uint8)
    target = rng.integers(0, 256, nbytes + to + MARGIN, dtype=np.uint8)
    expected = target.copy()
    expected[to : to + nbytes] = origin[source : source + nbytes]
    copy = lib.xccl_copy_streaming if streaming else lib.xccl_copy
    copy(ffi.from_buffer(target) + to, ffi.from_buffer(origin) + source, nbytes)
    assert np.array_equal(target, expected)


def test_should_stream_sooner_when_more_ranks_share_the_cache(lib: Any) -> None:
    sizes = [lib.xccl_copy_streaming_bytes(ranks) for ranks in (1, 2, 8, 4096)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] > 0
