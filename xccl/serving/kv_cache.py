"""Paged KV cache: latent rows of all layers in blocks of a fixed number of tokens."""

from __future__ import annotations

import numpy as np

from xccl.serving.arrays import FloatArray, IntArray

BLOCK_TOKENS = 16
NULL_BLOCK = 0


class BlockAllocator:
    """Hands out block numbers 1 .. num_blocks; block 0 is the null block, which nobody owns."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks, 0, -1))
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns now."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """Take ``count`` blocks, or return None and take none if there are fewer."""
        if count > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(count)]
        self._held.update(blocks)
        return blocks

    def release(self, blocks: list[int]) -> None:
        """Give blocks back. Raises ValueError for a block that is free already or does not exist."""
        for block in blocks:
            if block not in self._held:
                raise ValueError(f"block {block} is not allocated (the pool has 1 .. {self.num_blocks})")
            self._held.remove(block)
            self._free.append(block)


class PagedKVCache:
    """Latent KV rows [num_layers, blocks, BLOCK_TOKENS, width] and one block table a slot.

    A slot is the place of a running request. Its blocks are reserved in full at admission, so a request that was
    admitted can always finish: nothing is evicted and computed twice. Table entries that are not reserved name
    the null block, so a fixed-length context can be gathered for any slot; attention masks those rows.
    """

    def __init__(self, num_layers: int, num_slots: int, max_context: int, width: int, num_blocks: int) -> None:
        self.max_blocks = blocks_for(max_context)
        if num_blocks < 1:
            raise ValueError(f"a KV cache needs at least one block, got {num_blocks}")
        self.allocator = BlockAllocator(num_blocks)
        self.width = width
        self._storage: FloatArray = np.zeros((num_layers, num_blocks + 1, BLOCK_TOKENS, width), np.float32)
        self._table: IntArray = np.full((num_slots, self.max_blocks), NULL_BLOCK, np.int64)
        self._owned: list[list[int]] = [[] for _ in range(num_slots)]

    def reserve(self, slot: int, num_tokens: int) -> bool:
        """Reserve blocks for ``num_tokens`` tokens of a slot; False, and nothing reserved, if too few are free."""
        if self._owned[slot]:
            raise ValueError(f"slot {slot} already owns {len(self._owned[slot])} blocks")
        blocks = self.allocator.allocate(blocks_for(num_tokens))
        if blocks is None:
            return False
        self._owned[slot] = blocks
        self._table[slot, : len(blocks)] = blocks
        return True

    def release(self, slot: int) -> None:
        """Give all blocks of a slot back."""
        self.allocator.release(self._owned[slot])
        self._owned[slot] = []
        self._table[slot] = NULL_BLOCK

    def row_index(self, slots: IntArray, positions: IntArray) -> IntArray:
        """Cache row of each (slot, position), the same in every layer; both [rows]."""
        block, offset = np.divmod(positions, BLOCK_TOKENS)
        index: IntArray = self._table[slots, block] * BLOCK_TOKENS + offset
        return index

    def write(self, layer: int, rows: IntArray, values: FloatArray) -> None:
        """Store values [rows, width] at rows given by :meth:`row_index`."""
        self._storage[layer].reshape(-1, self.width)[rows] = values

    def gather(self, layer: int, slots: IntArray, context: int, out: FloatArray | None = None) -> FloatArray:
        """The first ``context`` rows of each slot: [slots, context, width], a copy (into ``out`` if given).

        ``context`` is a multiple of BLOCK_TOKENS. Rows beyond what was written have any finite value.
        """
        blocks = self._table[slots, : context // BLOCK_TOKENS]
        if out is not None:
            out = out.reshape(*blocks.shape, BLOCK_TOKENS, self.width)
        # clip: the default mode would copy through a temporary because it may raise half-way
        rows: FloatArray = np.take(self._storage[layer], blocks, axis=0, out=out, mode="clip")
        return rows.reshape(len(slots), context, self.width)


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold ``num_tokens`` tokens."""
    return -(-num_tokens // BLOCK_TOKENS)
