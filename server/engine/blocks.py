"""Accounts for the blocks of the KV cache, and finds the ones that already hold a prompt's beginning."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def chain_seed(*parts: bytes) -> bytes:
    """The start of a chain of block hashes. What differs in any part (base, adapter, tenant) never shares a block."""
    hasher = hashlib.blake2b(digest_size=32)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "big") + part)
    return hasher.digest()


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a full block, given its predecessor's. Collision-resistant: a match is taken as equality."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=32).digest()


class BlockPool:
    """Blocks 0..count-1: referenced by sequences, idle with content worth keeping, or blank.

    An allocation takes blank blocks first, then the least recently used idle ones.
    """

    def __init__(self, count: int, block_size: int):
        self.count, self.block_size = count, block_size
        self._references = [0] * count
        self._hash: list[bytes | None] = [None] * count
        self._by_hash: dict[bytes, int] = {}
        self._blank = list(range(count - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks an allocation could have."""
        return len(self._blank) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.count - self.available

    def needed(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None and no change."""
        if count > self.available:
            return None
        blocks = [self._take() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest known beginning of `hashes`; each gets a reference."""
        found = []
        for key in hashes:
            block = self._by_hash.get(key)
            if block is None:
                break
            self._idle.pop(block, None)
            self._references[block] += 1
            found.append(block)
        return found

    def publish(self, block: int, key: bytes) -> None:
        """The block is full and holds what `key` names; later prompts may share it. The first of a kind is kept."""
        if self._hash[block] is None and key not in self._by_hash:
            self._hash[block], self._by_hash[key] = key, block

    def release(self, blocks: Sequence[int]) -> None:
        """Gives back one reference each. The tail goes idle first, so that a prompt's beginning stays longest."""
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise AssertionError(f"block {block} released more often than taken")
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._hash[block] is None:
                    self._blank.append(block)
                else:
                    self._idle[block] = None

    def _take(self) -> int:
        if self._blank:
            return self._blank.pop()
        block, _ = self._idle.popitem(last=False)
        self._unname(block)
        return block

    def _unname(self, block: int) -> None:
        key = self._hash[block]
        if key is not None:
            del self._by_hash[key]
            self._hash[block] = None
