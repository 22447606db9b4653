"""Which blocks of the cache are whose, and which of them hold a known beginning of a text.

A block holds ``size`` tokens of one sequence. A full one has a key, a hash of all tokens up to
its end, under which another sequence that begins alike finds it: it is then held by both and
never written again. A block that nobody holds any more but that has a key waits, the longest
unused is taken first when the free ones run out (as in vLLM; Kwon et al. 2023). Host only: what
is in the blocks is in :mod:`serving.paged.storage`.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

Key = bytes


class BlockPool:
    """Blocks 1..``capacity``, each held by any number of sequences. Block 0 is nobody's: rows
    that only fill a batch up write there.

    remember: give full blocks keys, so that other sequences find them.
    """

    def __init__(self, capacity: int, size: int, *, remember: bool = True) -> None:
        if capacity < 1 or size < 1:
            raise ValueError(f"{capacity} blocks of {size} tokens")
        self.capacity, self.size, self.remember = capacity, size, remember
        # The lowest first: storage that grows then grows as little as it can.
        self._free = list(range(capacity, 0, -1))
        self._holders = [0] * (capacity + 1)
        self._block_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        # Tokens looked up in prefixes, and found there.
        self.asked = self.found = 0

    @property
    def available(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.capacity - self.available

    @property
    def remembered(self) -> int:
        """Blocks that have a key."""
        return len(self._key_of)

    def take(self) -> int:
        """A block for one holder; raises IndexError if all are held."""
        if self._free:
            block = self._free.pop()
        else:
            if not self._idle:
                raise IndexError("all blocks of the cache are held")
            block, _ = self._idle.popitem(last=False)
            self._lose_key(block)
        self._holders[block] = 1
        return block

    def hold(self, key: Key) -> int | None:
        """The block with ``key``, with one more holder, if there is one."""
        block = self._block_of.get(key)
        if block is not None:
            self._idle.pop(block, None)
            self._holders[block] += 1
        return block

    def publish(self, block: int, key: Key) -> None:
        """Let others find a full block. Of two of the same content the first is found."""
        if self.remember and key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key

    def give_back(self, block: int) -> None:
        """One holder less."""
        if self._holders[block] < 1:
            raise ValueError(f"block {block} is held by nobody")
        self._holders[block] -= 1
        if self._holders[block] == 0:
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def forget(self, block: int) -> None:
        """Nobody is to find the block any more: what is in it cannot be trusted."""
        self._lose_key(block)
        if block in self._idle:
            del self._idle[block]
            self._free.append(block)

    def _lose_key(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]


class Table:
    """The blocks of one sequence, in order."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.blocks: list[int] = []
        self._keys: list[Key] = []

    def missing(self, length: int) -> int:
        """How many more blocks ``length`` tokens need."""
        return max(0, -(-length // self._pool.size) - len(self.blocks))

    def extend(self, length: int) -> None:
        """Take blocks for ``length`` tokens; there must be enough."""
        self.blocks += [self._pool.take() for _ in range(self.missing(length))]

    def find(self, ids: Sequence[int]) -> int:
        """Hold the known blocks that ``ids`` begin with, into an empty table; tokens found.

        At least one token is left over: its logits are wanted.
        """
        if not self._pool.remember:
            return 0
        size = self._pool.size
        for start in range(0, (len(ids) - 1) // size * size, size):
            key = self._next_key(ids[start : start + size])
            block = self._pool.hold(key)
            if block is None:
                break
            self.blocks.append(block)
            self._keys.append(key)
        return len(self._keys) * size

    def publish(self, ids: Sequence[int], length: int) -> None:
        """Let others find the blocks that are full after ``length`` of ``ids``."""
        if not self._pool.remember:
            return
        size = self._pool.size
        while (end := (len(self._keys) + 1) * size) <= length:
            key = self._next_key(ids[end - size : end])
            self._pool.publish(self.blocks[len(self._keys)], key)
            self._keys.append(key)

    def release(self, *, forget: bool = False) -> None:
        """Give all blocks back. The last ones first: of a text the beginning is found more
        often, so that it is kept longer."""
        for block in reversed(self.blocks):
            if forget:
                self._pool.forget(block)
            self._pool.give_back(block)
        self.blocks, self._keys = [], []

    def _next_key(self, ids: Sequence[int]) -> Key:
        before = self._keys[-1] if self._keys else b""
        return blake2b(before + array("q", ids).tobytes(), digest_size=16).digest()
