"""Keys and values of all blocks, one pair of tensors a layer.

Shape suffixes: K blocks, G key/value heads, P tokens of a block, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Tokens of a block. Prefixes are shared in these steps.
BLOCK_SIZE = 16
# Blocks that storage on the host begins with.
FIRST_BLOCKS = 64


@dataclass(frozen=True)
class CacheShape:
    """Of what is kept for a token: layers x groups x head x 2 numbers of ``dtype``. repeats: query
    heads that share those of a group."""

    layers: int
    groups: int
    head: int
    dtype: torch.dtype
    device: torch.device
    block: int = BLOCK_SIZE
    repeats: int = 1

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.groups * self.head * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block


class Storage:
    """Room for blocks 0..``capacity``.

    On a GPU all of it is allocated at once, as captured graphs keep its addresses. On the host
    it grows with the highest block in use, by doubling.
    """

    def __init__(self, shape: CacheShape, capacity: int) -> None:
        self.shape, self.capacity, self._most = shape, capacity, capacity + 1
        fixed = shape.device.type == "cuda"
        self.blocks = self._most if fixed else min(FIRST_BLOCKS, self._most)
        self.keys_KGPD = [self._empty(self.blocks) for _ in range(shape.layers)]
        self.values_KGPD = [self._empty(self.blocks) for _ in range(shape.layers)]

    @property
    def bytes(self) -> int:
        return self.blocks * self.shape.block_bytes

    def reserve(self, highest: int) -> None:
        """Have room for block number ``highest``."""
        if highest >= self._most:
            raise ValueError(f"block {highest} of {self._most}")
        if highest >= self.blocks:
            self.blocks = min(self._most, max(2 * self.blocks, highest + 1))
            for stores in (self.keys_KGPD, self.values_KGPD):
                for layer, store in enumerate(stores):
                    grown = self._empty(self.blocks)
                    grown[: store.shape[0]] = store
                    stores[layer] = grown

    def write(
        self, layer: int, places: tuple[Tensor, Tensor], k_NGD: Tensor, v_NGD: Tensor
    ) -> None:
        """Put tokens at ``places``: block and place in the block, both int64 [N]."""
        self.keys_KGPD[layer].transpose(1, 2)[places] = k_NGD
        self.values_KGPD[layer].transpose(1, 2)[places] = v_NGD

    def _empty(self, blocks: int) -> Tensor:
        s = self.shape
        # Zeros, not what was in memory before: it could be NaN.
        return torch.zeros(blocks, s.groups, s.block, s.head, dtype=s.dtype, device=s.device)
