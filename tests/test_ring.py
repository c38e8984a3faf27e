"""The ring alone, without ranks: positions poked near the borders of integer types, raw bytes, and a race."""

from __future__ import annotations

import itertools
import os
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
LINE, CONTENT = 64, 56
POSITIONS = [0, 1, 2**31 - 3, 2**32 - 3, 2**62 - 3, 2**63 - 3, 2**64 - 3]
PRODUCER, CONSUMER = 0, 1

ffi = FFI()
ffi.cdef("""
    typedef struct pair_t pair_t;
    pair_t *pair_new(uint64_t lines, uint64_t blocks, uint64_t block_bytes, uint64_t position);
    void pair_free(pair_t *pair);
    int pair_send(pair_t *pair, const void *content, const void *block, uint64_t bytes);
    int pair_receive(pair_t *pair, void *content, void *block, uint64_t bytes);
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
    sources = [TESTS / "c" / "ring_harness.c", CSRC / "ring.c"]
    flags = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread", f"-I{CSRC}"]
    subprocess.run([os.environ.get("CC", "cc"), *flags, *map(str, sources), "-o", str(library)], check=True)
    return ffi.dlopen(str(library))


class Pair:
    """A ring whose memory is visible."""

    def __init__(self, lib: Any, lines: int, blocks: int, block_bytes: int, position: int) -> None:
        self.lib, self.lines, self.blocks, self.block_bytes = lib, lines, blocks, block_bytes
        self.pair = ffi.gc(lib.pair_new(lines, blocks, block_bytes, position), lib.pair_free)

    def send(self, content: bytes, block: bytes | None = None) -> bool:
        source = ffi.NULL if block is None else ffi.from_buffer(block)
        return bool(self.lib.pair_send(self.pair, content.ljust(CONTENT, b"\0"), source, len(block or b"")))

    def receive(self) -> tuple[bytes, bytes] | None:
        content, block = bytearray(CONTENT), bytearray(self.block_bytes)
        buffers = ffi.from_buffer(content), ffi.from_buffer(block)
        if not self.lib.pair_receive(self.pair, *buffers, self.block_bytes):
            return None
        return bytes(content), bytes(block)

    def window(self, rank: int) -> bytes:
        return bytes(ffi.buffer(self.lib.pair_window(self.pair, rank), self.lib.pair_stride(self.pair)))

    def line(self, position: int) -> bytes:
        start = LINE + position % self.lines * LINE
        return self.window(CONSUMER)[start : start + LINE]

    def block(self, position: int) -> bytes:
        start = LINE + self.lines * LINE + position % self.blocks * self.block_bytes
        return self.window(CONSUMER)[start : start + self.block_bytes]

    def tail_word(self) -> int:
        return int.from_bytes(self.window(PRODUCER)[:8], "little")


@pytest.fixture(params=POSITIONS, ids=hex)
def position(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_should_write_sequence_and_content_in_one_line_when_publishing(lib: Any, position: int) -> None:
    pair = Pair(lib, 8, 4, 128, position)
    before = pair.window(CONSUMER)
    assert pair.send(b"inline")
    sequence = (position + 1) % 2**64
    assert pair.line(position) == sequence.to_bytes(8, "little") + b"inline".ljust(CONTENT, b"\0")
    start = LINE + position % 8 * LINE
    after = pair.window(CONSUMER)
    assert after[:start] == before[:start]
    assert after[start + LINE :] == before[start + LINE :]
    assert lib.pair_rung(pair.pair, CONSUMER) == 1


def test_should_use_the_block_of_its_position_when_publishing_a_block(lib: Any, position: int) -> None:
    pair = Pair(lib, 8, 4, 128, position)
    for i in range(4):
        assert pair.send(b"chunk", bytes([i + 1]) * 128)
    for i in range(4):
        assert pair.block(position + i) == bytes([i + 1]) * 128


@pytest.mark.parametrize("with_block", [False, True])
def test_should_refuse_and_change_nothing_when_full(lib: Any, position: int, with_block: bool) -> None:
    pair = Pair(lib, 8, 4, 128, position)
    block = b"x" * 128 if with_block else None
    capacity = 4 if with_block else 8
    assert [pair.send(b"m", block) for _ in range(capacity)] == [True] * capacity
    head, memory = lib.pair_head(pair.pair), [pair.window(rank) for rank in range(2)]
    assert not pair.send(b"refused", block)
    assert lib.pair_head(pair.pair) == head == (position + capacity) % 2**64
    assert [pair.window(rank) for rank in range(2)] == memory


def test_should_refuse_a_block_but_not_a_line_when_only_blocks_are_used_up(lib: Any, position: int) -> None:
    pair = Pair(lib, 8, 4, 128, position)
    for _ in range(4):
        assert pair.send(b"m")
    assert not pair.send(b"chunk", b"x" * 128)
    assert pair.send(b"m")


def test_should_find_nothing_when_the_line_is_of_the_last_lap(lib: Any, position: int) -> None:
    pair = Pair(lib, 8, 4, 128, position)
    assert pair.receive() is None
    for lap in range(3):
        for i in range(8):
            assert pair.send(bytes([lap, i]))
            received = pair.receive()
            assert received is not None
            assert received[0][:2] == bytes([lap, i])
            assert pair.receive() is None


def test_should_release_by_halves_when_consuming(lib: Any, position: int) -> None:
    pair = Pair(lib, 8, 4, 128, position)
    words = []
    for _ in range(6):
        assert pair.send(b"m")
        assert pair.receive()
        words.append((pair.tail_word() - position) % 2**64)
    assert words == [0, 2, 2, 4, 4, 6]
    assert lib.pair_rung(pair.pair, PRODUCER) == 3


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_should_never_strand_the_producer_when_all_is_consumed(lib: Any, position: int, blocks: int) -> None:
    pair = Pair(lib, 16, blocks, 64, position)
    for count in range(1, 40):
        for _ in range(count % 13):
            assert pair.send(b"m")
        while pair.receive():
            pass
        assert pair.send(b"chunk", b"x" * 64), f"no block free after {count} rounds although all is consumed"
        assert pair.receive()


@settings(deadline=None, max_examples=200)
@given(
    position=st.sampled_from(POSITIONS),
    blocks=st.sampled_from([1, 2, 4]),
    lines=st.sampled_from([4, 8]),
    steps=st.lists(st.sampled_from(["line", "block", "receive"]), max_size=80),
)
def test_should_behave_as_a_bounded_queue(lib: Any, position: int, blocks: int, lines: int, steps: list[str]) -> None:
    pair = Pair(lib, lines, blocks, 64, position)
    queue: deque[tuple[bytes, bytes | None]] = deque()
    for number, step in zip(itertools.count(), steps, strict=False):
        content, block = str(number).encode(), str(-number).encode() * 8
        if step == "receive":
            received = pair.receive()
            assert (received is None) == (not queue)
            if received is not None:
                expected, expected_block = queue.popleft()
                assert received[0].rstrip(b"\0") == expected
                assert expected_block is None or received[1].startswith(expected_block)
            continue
        sent = pair.send(content, block if step == "block" else None)
        # The producer may know of the tail late, but never by half the blocks or more.
        unreleased = max((blocks + 1) // 2 - 1, 0)
        capacity = lines if step == "line" else blocks
        assert sent or len(queue) + unreleased >= capacity
        assert not sent or len(queue) < capacity
        if sent:
            queue.append((content, block if step == "block" else None))


def test_should_pass_a_million_messages_between_two_threads(lib: Any) -> None:
    pair = Pair(lib, 16, 4, 128, 2**32 - 500_000)
    assert lib.pair_race(pair.pair, 1_000_000) == 0
    assert lib.pair_head(pair.pair) == lib.pair_tail(pair.pair) == 2**32 + 500_000
