"""What decoders keep of encoded prompts: keys and values of the encoder's states, by layer.

A prompt is encoded once, and its keys and values are shared by all sequences that have it:
samples, beams, other requests. Those in use lie in slots 0..n-1, so that a step reads a plain
slice; behind them lie prompts that nobody uses any more until their slot is needed, the longest
unused first.

Shape suffixes: M slots, G key/value heads, H query heads, S tokens of a prompt, D channels of a
head, B rows, T new tokens, K rows of a slot.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtk.models.attention import EVERYWHERE, sdpa_kernel
from serving.kv_cache import LayerStore, doubled

# Keys and values [1, G, S, D] of each layer.
Encoded = Sequence[tuple[Tensor, Tensor]]


@dataclass(eq=False)
class Memory:
    """An encoded prompt. users: rows that have it. released: when the last one left."""

    prompt: tuple[int, ...]
    slot: int
    users: int = 0
    released: int = 0


class EncoderMemory:
    """Keys and values of all encoded prompts."""

    def __init__(self, num_layers: int) -> None:
        self._layers = [LayerStore() for _ in range(num_layers)]
        self._slots: list[Memory] = []
        self._known: dict[tuple[int, ...], Memory] = {}
        self._used = 0
        self._clock = itertools.count()

    @property
    def tokens(self) -> int:
        """Tokens of the prompts in use, each counted once."""
        return sum(len(memory.prompt) for memory in self._slots[: self._used])

    def take(self, prompt: tuple[int, ...], encode: Callable[[], Encoded]) -> Memory:
        """The prompt's memory with one user more; ``encode`` is called if there is none."""
        memory = self._known.get(prompt)
        if memory is None:
            encoded = encode()
            memory = self._new(prompt)
            self._write(memory, encoded)
        if memory.users == 0:
            self._exchange(memory, self._used)
            self._used += 1
        memory.users += 1
        return memory

    def share(self, memory: Memory) -> None:
        """One user more of a memory in use."""
        memory.users += 1

    def release(self, memory: Memory) -> None:
        """One user less."""
        memory.users -= 1
        if memory.users == 0:
            memory.released = next(self._clock)
            self._used -= 1
            self._exchange(memory, self._used)

    def looks(self, rows: Sequence[Memory]) -> list[Callable[[Tensor], Tensor]]:
        """For each layer what lets queries [B, H, T, D] look at the memories of ``rows``."""
        first = self._layers[0].keys_RGTD
        assert first is not None
        slots = range(rows[0].slot, rows[0].slot + 1) if len(rows) == 1 else range(self._used)
        gather = _Gather.of(rows, slots, [len(m.prompt) for m in self._slots], first.device)
        return [_Look(layer, slots, gather) for layer in self._layers]

    def _new(self, prompt: tuple[int, ...]) -> Memory:
        """A memory in the slot that was unused longest, or in a further one."""
        unused = self._slots[self._used :]
        if not unused:
            memory = Memory(prompt, len(self._slots))
            self._slots.append(memory)
        else:
            oldest = min(unused, key=lambda each: each.released)
            del self._known[oldest.prompt]
            memory = Memory(prompt, oldest.slot)
            self._slots[oldest.slot] = memory
        self._known[prompt] = memory
        return memory

    def _write(self, memory: Memory, encoded: Encoded) -> None:
        for layer, (keys, values) in zip(self._layers, encoded, strict=True):
            layer.write_row(memory.slot, keys, values, rows=doubled(len(self._slots)))

    def _exchange(self, memory: Memory, slot: int) -> None:
        other, old = self._slots[slot], memory.slot
        if old != slot:
            for layer in self._layers:
                layer.exchange_rows(old, slot)
            self._slots[slot], self._slots[old] = memory, other
            memory.slot, other.slot = slot, old


@dataclass(frozen=True)
class _Gather:
    """How rows become queries of their slots, so that what rows share is read once.

    slots_B, places_B: where each row's query goes. width: most rows of a slot. seen_MS: bool, the
    tokens of each slot's prompt; longest: of these.
    """

    slots_B: Tensor
    places_B: Tensor
    count: int
    width: int
    longest: int
    seen_MS: Tensor = field(repr=False)

    @classmethod
    def of(
        cls, rows: Sequence[Memory], slots: range, lengths: Sequence[int], device: torch.device
    ) -> _Gather:
        taken = [0] * len(slots)
        own, places = [], []
        for memory in rows:
            slot = memory.slot - slots.start
            own.append(slot)
            places.append(taken[slot])
            taken[slot] += 1
        lengths_M = torch.tensor([lengths[slot] for slot in slots], device=device)
        longest = max(lengths[slot] for slot in slots)
        seen_MS = torch.arange(longest, device=device)[None, :] < lengths_M[:, None]
        index = torch.tensor([own, places], device=device)
        return cls(index[0], index[1], len(slots), max(taken), longest, seen_MS)


class _Look:
    """Implements :class:`mtk.models.attention.Look` for one layer in one forward pass."""

    def __init__(self, layer: LayerStore, slots: range, gather: _Gather) -> None:
        self._layer, self._slots, self._gather = layer, slots, gather

    def __call__(self, q_BHTD: Tensor) -> Tensor:
        """T is 1: every row has one new token."""
        gather = self._gather
        keys, values = self._layer.keys_RGTD, self._layer.values_RGTD
        assert keys is not None and values is not None
        own = slice(self._slots.start, self._slots.stop)
        shape = (gather.count, q_BHTD.shape[1], gather.width, q_BHTD.shape[3])
        q_MHKD = q_BHTD.new_zeros(shape)
        q_MHKD[gather.slots_B, :, gather.places_B] = q_BHTD[:, :, 0]
        out_MHKD = sdpa_kernel(
            q_MHKD,
            keys[own, :, : gather.longest],
            values[own, :, : gather.longest],
            mask=gather.seen_MS[:, None, None, :],
            dropout=0.0,
            form=EVERYWHERE,
        )
        return out_MHKD[gather.slots_B, :, gather.places_B][:, :, None]
