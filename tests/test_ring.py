"""The ring alone, without ranks: positions poked near the borders of integer types, raw bytes, and a race."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from cffi import FFI
from hypothesis import given, settings
from hypothesis import strategies as st

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
PARTS = ("ring", "copy", "cache", "chaos", "chaos_puts", "status")  # chaos is called, but off
LINE, REST = 64, 32
POSITIONS = [0, 1, 2**31 - 3, 2**32 - 3, 2**62 - 3, 2**63 - 3, 2**64 - 3]
PRODUCER, CONSUMER = 0, 1

ffi = FFI()
ffi.cdef("""
    typedef struct pair_t pair_t;
    pair_t *pair_new(uint64_t lines, uint64_t data_bytes, uint64_t position);
    void pair_free(pair_t *pair);
    int pair_send(pair_t *pair, const void *rest, const void *data, uint64_t bytes);
    int64_t pair_receive(pair_t *pair, void *rest, void *data);
    void pair_limit(pair_t *pair, uint64_t bytes);
    void pair_far_ticks(pair_t *pair, uint64_t ticks);
    int pair_is_far(const pair_t *pair);
    uint64_t pair_head(const pair_t *pair);
    uint64_t pair_tail(const pair_t *pair);
    uint64_t pair_rung(const pair_t *pair, int rank);
    unsigned char *pair_window(const pair_t *pair, int rank);
    uint64_t pair_stride(const pair_t *pair);
    uint64_t pair_race(pair_t *pair, uint64_t count);
""")


@pytest.fixture(scope="session")
def lib(tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = tmp_path_factory.mktemp("ring") / "ring_harness.so"
    sources = [TESTS / "c" / "ring_harness.c", *(CSRC / f"{name}.c" for name in PARTS)]
    flags = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread", f"-I{CSRC}"]
    subprocess.run([os.environ.get("CC", "cc"), *flags, *map(str, sources), "-o", str(library)], check=True)
    return ffi.dlopen(str(library))


class Pair:
    """A ring whose memory is visible."""

    def __init__(self, lib: Any, lines: int, data_bytes: int, position: int) -> None:
        self.lib, self.lines, self.data_bytes = lib, lines, data_bytes
        self.pair = ffi.gc(lib.pair_new(lines, data_bytes, position), lib.pair_free)

    def send(self, rest: bytes, data: bytes = b"") -> bool:
        return bool(self.lib.pair_send(self.pair, rest.ljust(REST, b"\0"), ffi.from_buffer(data), len(data)))

    def receive(self) -> tuple[bytes, bytes] | None:
        rest, data = bytearray(REST), bytearray(self.data_bytes)
        nbytes = self.lib.pair_receive(self.pair, ffi.from_buffer(rest), ffi.from_buffer(data))
        return None if nbytes < 0 else (bytes(rest), bytes(data[:nbytes]))

    def limit(self, nbytes: int) -> None:
        self.lib.pair_limit(self.pair, nbytes)

    def window(self, rank: int) -> bytes:
        return bytes(ffi.buffer(self.lib.pair_window(self.pair, rank), self.lib.pair_stride(self.pair)))

    def line(self, position: int) -> bytes:
        start = LINE + position % self.lines * LINE
        return self.window(CONSUMER)[start : start + LINE]

    def data(self) -> bytes:
        start = LINE + self.lines * LINE
        return self.window(CONSUMER)[start : start + self.data_bytes]

    def tail_word(self) -> int:
        return int.from_bytes(self.window(PRODUCER)[:8], "little")


@pytest.fixture(params=POSITIONS, ids=hex)
def position(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_should_write_sequence_and_content_in_one_line_when_publishing(lib: Any, position: int) -> None:
    pair = Pair(lib, 8, 512, position)
    before = pair.window(CONSUMER)
    assert pair.send(b"inline")
    sequence = (position + 1) % 2**64
    assert pair.line(position) == sequence.to_bytes(8, "little") + bytes(24) + b"inline".ljust(REST, b"\0")
    start = LINE + position % 8 * LINE
    after = pair.window(CONSUMER)
    assert after[:start] == before[:start]
    assert after[start + LINE :] == before[start + LINE :]
    assert lib.pair_rung(pair.pair, CONSUMER) == 1


def test_should_lay_pieces_densely_from_whole_lines(lib: Any, position: int) -> None:
    pair = Pair(lib, 8, 512, position)
    for i, nbytes in enumerate([64, 100, 1, 128]):
        assert pair.send(b"chunk", bytes([i + 1]) * nbytes)
    expected = b"".join(bytes([i + 1]) * n + bytes(-n % 64) for i, n in enumerate([64, 100, 1, 128]))
    assert pair.data() == expected.ljust(512, b"\0")


def test_should_start_again_at_the_front_when_a_piece_does_not_fit_before_the_end(lib: Any, position: int) -> None:
    pair = Pair(lib, 8, 512, position)
    for i in range(4):
        assert pair.send(b"chunk", bytes([i + 1]) * 100)
        assert pair.receive() == (b"chunk".ljust(REST, b"\0"), bytes([i + 1]) * 100)
    assert pair.send(b"chunk", b"x" * 65)
    assert pair.data()[:65] == b"x" * 65
    assert pair.receive() == (b"chunk".ljust(REST, b"\0"), b"x" * 65)


@pytest.mark.parametrize("nbytes", [0, 1, 64, 128])
def test_should_refuse_and_change_nothing_when_full(lib: Any, position: int, nbytes: int) -> None:
    pair = Pair(lib, 8, 512, position)
    capacity = 512 // nbytes if nbytes == 128 else 8
    assert [pair.send(b"m", b"x" * nbytes) for _ in range(capacity)] == [True] * capacity
    head, memory = lib.pair_head(pair.pair), [pair.window(rank) for rank in range(2)]
    assert not pair.send(b"refused", b"y" * nbytes)
    assert lib.pair_head(pair.pair) == head == (position + capacity) % 2**64
    assert [pair.window(rank) for rank in range(2)] == memory


def test_should_refuse_a_piece_but_not_a_line_when_only_the_data_is_used_up(lib: Any, position: int) -> None:
    pair = Pair(lib, 8, 256, position)
    for _ in range(4):
        assert pair.send(b"chunk", b"x" * 64)
    assert not pair.send(b"chunk", b"x")
    assert pair.send(b"m")


def test_should_find_nothing_when_the_line_is_of_the_last_lap(lib: Any, position: int) -> None:
    pair = Pair(lib, 8, 256, position)
    assert pair.receive() is None
    for lap in range(3):
        for i in range(8):
            assert pair.send(bytes([lap, i]))
            received = pair.receive()
            assert received is not None
            assert received[0][:2] == bytes([lap, i])
            assert pair.receive() is None


def test_should_release_lines_by_halves(lib: Any, position: int) -> None:
    pair = Pair(lib, 4, 256, position)
    words = []
    for _ in range(6):
        assert pair.send(b"m")
        assert pair.receive()
        words.append((pair.tail_word() - position) % 2**64)
    assert words == [0, 2, 2, 4, 4, 6]
    assert lib.pair_rung(pair.pair, PRODUCER) == 3


def test_should_release_data_by_quarters(lib: Any, position: int) -> None:
    pair = Pair(lib, 64, 1024, position)
    words = []
    for _ in range(12):
        assert pair.send(b"chunk", b"x" * 64)
        assert pair.receive()
        words.append((pair.tail_word() - position) % 2**64)
    assert words == [0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12]


@settings(deadline=None, max_examples=300)
@given(
    position=st.sampled_from(POSITIONS),
    lines=st.sampled_from([1, 2, 4, 8, 64]),
    quarters=st.sampled_from([64, 128, 256, 1024]),
    limit=st.none() | st.floats(0, 1),
    rounds=st.lists(st.lists(st.floats(0, 1), max_size=12), max_size=12),
)
def test_should_never_strand_the_producer_when_all_is_consumed(
    lib: Any, position: int, lines: int, quarters: int, limit: float | None, rounds: list[list[float]]
) -> None:
    pair = Pair(lib, lines, 4 * quarters, position)
    if limit is not None:
        quarters = max(1, int(limit * quarters // 64)) * 64
        pair.limit(4 * quarters)
    for pieces in rounds:
        for piece in pieces:
            pair.send(b"m", b"x" * int(piece * quarters))
        while pair.receive():
            pass
        assert pair.send(b"chunk", b"x" * quarters), "no room for a piece although all is consumed"
        assert pair.receive()


def test_should_use_no_data_beyond_the_limit(lib: Any, position: int) -> None:
    pair = Pair(lib, 64, 2048, position)
    for _ in range(4):
        assert pair.send(b"chunk", b"x" * 64)
    pair.limit(512)
    for i in range(60):
        assert pair.send(b"chunk", bytes([i]) * (1 + 7 * i % 128)) or pair.receive()
    assert not any(pair.data()[512:])


@settings(deadline=None, max_examples=300)
@given(
    position=st.sampled_from(POSITIONS),
    lines=st.sampled_from([4, 8]),
    quarter=st.sampled_from([64, 192]),
    steps=st.lists(st.none() | st.floats(0, 1), max_size=80),
)
def test_should_behave_as_a_bounded_queue(
    lib: Any, position: int, lines: int, quarter: int, steps: list[float | None]
) -> None:
    """A step receives, or sends a piece of so large a part of the largest."""
    pair = Pair(lib, lines, 4 * quarter, position)
    queue: deque[tuple[bytes, bytes]] = deque()
    for number, step in zip(itertools.count(), steps, strict=False):
        if step is None:
            assert pair.receive() == (queue.popleft() if queue else None)
            continue
        rest, data = str(number).encode().ljust(REST, b"\0"), bytes([number + 1]) * int(step * quarter)
        if pair.send(rest, data):
            queue.append((rest, data))
        used = sum((len(data) + 63) // 64 * 64 for _, data in queue)
        assert len(queue) <= lines
        assert used <= 4 * quarter


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the time of a load is known on x86-64 only")
def test_should_notice_how_far_the_consumer_is(lib: Any, position: int) -> None:
    pair = Pair(lib, 4, 256, position)

    def laps(ticks: int) -> list[bool]:
        lib.pair_far_ticks(pair.pair, ticks)
        far = []
        for _ in range(10):
            while pair.send(b"m"):
                pass
            while pair.receive():
                pass
            far.append(bool(lib.pair_is_far(pair.pair)))
        return far

    never, always = 1 << 62, 1
    assert not any(laps(0))
    assert not any(laps(never))
    assert laps(always)[-1]
    assert not laps(never)[-1]


@pytest.mark.parametrize("far_ticks", [0, 1], ids=["near", "far"])
def test_should_pass_a_million_messages_between_two_threads(lib: Any, far_ticks: int) -> None:
    pair = Pair(lib, 16, 1024, 2**32 - 500_000)
    lib.pair_far_ticks(pair.pair, far_ticks)
    assert lib.pair_race(pair.pair, 1_000_000) == 0
    assert lib.pair_head(pair.pair) == lib.pair_tail(pair.pair) == 2**32 + 500_000
