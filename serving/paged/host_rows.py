"""Keys and values of running sequences on the host, one dense row each.

A processor reads a sequence's tokens at full speed only where they follow one another. Blocks do
not: each step would copy all of them. So what a sequence has in blocks is copied once, when it
begins to decode, into a row, which then grows by a token a step; a block that has become full in
it goes back to the cache, where others find it. Blocks, their sharing and the schedule stay what
they are on a GPU; of running sequences keys and values are held a second time.

Shape suffixes: B places of a step, of which a row has one and another for each of its guesses, R
rows of the store, G key/value heads, C tokens that a row has
room for, T tokens looked at, P tokens of a block, W blocks, H query heads, J = H/G, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtk.models.attention import Attention
from serving.paged.rotation import rotate_heads
from serving.paged.schedule import Row
from serving.paged.storage import Storage

# Rows grow in these steps of tokens, and by half of what they are.
LENGTH_STEP = 64
# Attention of a row alone costs about as much more as looking at so many tokens.
CALL_TOKENS = 48


@dataclass(frozen=True)
class HostStep:
    """Which rows of the store a step decodes, how many new tokens each has, and how many it looks
    at, the new ones among them. together: they are the first rows, and looked at in one call."""

    places: Sequence[int]
    widths: Sequence[int]
    lengths: Sequence[int]
    together: bool


class HostRows:
    """Rows 0..``count`` - 1 are in use; a freed one is filled by moving the last one into it.

    apart: look at every row by itself, so that its attention is the same in any company.
    """

    def __init__(self, storage: Storage, *, apart: bool = False) -> None:
        self._storage, self._apart = storage, apart
        self._owners: list[tuple[Row, int]] = []
        self._place: dict[Row, int] = {}
        self._lengths: list[int] = []
        # Per layer, keys' heads before values'.
        self.stores: list[Tensor] = []

    @property
    def count(self) -> int:
        return len(self._owners)

    @property
    def repeats(self) -> int:
        """Query heads of a group."""
        return self._storage.shape.repeats

    @property
    def bytes(self) -> int:
        return sum(store.nbytes for store in self.stores)

    def ordered(self, rows: Sequence[Row]) -> list[Row]:
        """``rows`` as they lie here; those that are new come last."""
        self._free_ended()
        return sorted(rows, key=lambda row: self._place.get(row, self.count))

    def begin(self, rows: Sequence[Row]) -> HostStep:
        """Have all that ``rows`` hold, and room for their new tokens; ``cached`` counts them.

        rows: in the order of :meth:`ordered`.
        """
        fresh = [row for row in rows if row not in self._place]
        self._reserve(self.count + len(fresh), max(row.cached for row in rows))
        for row in fresh:
            self._load(row)
        places = [self._place[row] for row in rows]
        lengths = [row.cached for row in rows]
        for place, length in zip(places, lengths, strict=True):
            self._shorten(place, length)
            self._lengths[place] = length
        widths = [row.width for row in rows]
        together = max(widths) == 1 and self._together(places, lengths)
        return HostStep(places, widths, lengths, together)

    def keep_full(self, rows: Sequence[Row]) -> None:
        """Put blocks that the last step made full into the cache."""
        size, groups = self._storage.shape.block, self._storage.shape.groups
        for row in rows:
            # With guesses that are wrong, such a block is not told to anybody, and put there again.
            for number in range((row.cached - row.width) // size, row.cached // size):
                block, start = row.table.blocks[number], number * size
                for layer, store in enumerate(self.stores):
                    kv_GPD = store[self._place[row], :, start : start + size]
                    self._storage.keys_KGPD[layer][block] = kv_GPD[:groups]
                    self._storage.values_KGPD[layer][block] = kv_GPD[groups:]

    def _together(self, places: Sequence[int], lengths: Sequence[int]) -> bool:
        """Whether one call that looks at the longest row's tokens for all is cheaper than one
        for each row."""
        if self._apart or list(places) != list(range(len(places))):
            return False
        return len(places) * max(lengths) <= sum(lengths) + CALL_TOKENS * len(lengths)

    def _shorten(self, place: int, length: int) -> None:
        """Forget wrong guesses behind ``length``: they may be NaN, which a mask does not hide."""
        if length < self._lengths[place]:
            for store in self.stores:
                store[place, :, length : self._lengths[place]] = 0

    def _free_ended(self) -> None:
        # From the end, so that the row that moves into a gap has been looked at already.
        for place in reversed(range(self.count)):
            row, begun = self._owners[place]
            if row.slot is None or row.begun != begun:
                self._free(place)
        if not self._owners:
            self.stores = []

    def _free(self, place: int) -> None:
        del self._place[self._owners[place][0]]
        last = self.count - 1
        if place != last:
            length = self._lengths[last]
            for store in self.stores:
                store[place, :, :length] = store[last, :, :length]
                store[place, :, length:] = 0
            self._owners[place], self._lengths[place] = self._owners[last], self._lengths[last]
            self._place[self._owners[place][0]] = place
        self._owners.pop()
        self._lengths.pop()

    def _load(self, row: Row) -> None:
        """Copy what a sequence has in blocks, all tokens but the new ones."""
        place, length = self.count, row.cached - row.width
        size = self._storage.shape.block
        blocks_W = torch.tensor(row.table.blocks[: -(-length // size)])
        groups = self._storage.shape.groups
        for layer, store in enumerate(self.stores):
            stored = self._storage.keys_KGPD[layer], self._storage.values_KGPD[layer]
            for heads, blocks_KGPD in zip((store[place, :groups], store[place, groups:]), stored,
                                          strict=True):  # fmt: skip
                kept = blocks_KGPD[blocks_W].transpose(0, 1).flatten(1, 2)
                heads[:, :length] = kept[:, :length]
            # What an earlier sequence left may be NaN, which a mask alone does not hide.
            store[place, :, length:] = 0
        self._owners.append((row, row.begun))
        self._place[row] = place
        self._lengths.append(length)

    def _reserve(self, rows: int, length: int) -> None:
        shape = self._storage.shape
        if not self.stores:
            size = (_doubled(rows), 2 * shape.groups, _stepped(length), shape.head)
            self.stores = [torch.zeros(size, dtype=shape.dtype) for _ in range(shape.layers)]
        for layer, store in enumerate(self.stores):
            had_rows, heads, had, width = store.shape
            if rows <= had_rows and length <= had:
                return
            room = had if length <= had else _stepped(max(length, had + had // 2))
            grown = store.new_zeros(max(_doubled(rows), had_rows), heads, room, width)
            grown[: self.count, :, :had] = store[: self.count]
            self.stores[layer] = grown


def _stepped(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def _doubled(rows: int) -> int:
    return 1 << (rows - 1).bit_length()


class HostAttention:
    """Rotation, storing and attention of a step's new tokens."""

    def __init__(
        self,
        rows: HostRows,
        step: HostStep,
        rotary: tuple[Tensor, Tensor] | None,
        window: int | None,
    ) -> None:
        self._rows, self._step, self._rotary, self._window = rows, step, rotary, window
        self._repeats = rows.repeats
        _, heads, room, _ = rows.stores[0].shape if rows.stores else (0, 0, 0, 0)
        self._groups = heads // 2
        # Where each head's new key or value goes in a store of one row a token and head.
        spans = list(zip(step.places, step.widths, step.lengths, strict=True))
        ends = [(place, end) for place, width, length in spans
                for end in range(length - width, length)]  # fmt: skip
        places_B1, ends_B1 = (x[:, None] for x in torch.tensor(ends).unbind(1))
        self._at = ((places_B1 * heads + torch.arange(heads)) * room + ends_B1).flatten()
        self._mask = self._made_mask() if step.together else None
        self._masks = [self._causal(width, length) for _, width, length in spans]

    def whole(self, layer: int, own: Attention, qkv: Tensor) -> Tensor:
        """[B, H, D] of queries, keys and values of all heads side by side, [B, (H + 2G) x D]."""
        heads_BND = qkv.view(qkv.shape[0], -1, own.head_size)
        queries = heads_BND.shape[1] - 2 * self._groups
        rotate_heads(heads_BND, queries, self._groups, own, self._rotary)
        store_RNCD = self._rows.stores[layer]
        # Rows that only fill the step up have no place.
        kv_ND = heads_BND[: sum(self._step.widths), queries:].reshape(-1, own.head_size)
        store_RNCD.view(-1, own.head_size).index_copy_(0, self._at, kv_ND)
        # Queries that share keys side by side, as if they were tokens.
        q_BGJD = heads_BND[:, :queries].view(len(qkv), self._groups, -1, own.head_size)
        attend = self._all if self._step.together else self._each
        return attend(q_BGJD, store_RNCD).flatten(1, 2)

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        raise NotImplementedError("rows on the host are looked at by `whole`")

    def _all(self, q_BGJD: Tensor, store_RNCD: Tensor) -> Tensor:
        kv = store_RNCD[: q_BGJD.shape[0], :, : max(self._step.lengths)]
        k, v = kv[:, : self._groups], kv[:, self._groups :]
        return F.scaled_dot_product_attention(q_BGJD, k, v, attn_mask=self._mask)

    def _each(self, q_BGJD: Tensor, store_RNCD: Tensor) -> Tensor:
        out, done, step = torch.zeros_like(q_BGJD), 0, self._step
        for place, width, length, mask in zip(
            step.places, step.widths, step.lengths, self._masks, strict=True
        ):
            kv = store_RNCD[place : place + 1, :, self._first(width, length) : length]
            k, v = kv[:, : self._groups], kv[:, self._groups :]
            own = q_BGJD[done : done + width]
            # The queries of all new tokens side by side as well.
            q = own.transpose(0, 1).flatten(1, 2)[None]
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0]
            out[done : done + width] = found.reshape(own.transpose(0, 1).shape).transpose(0, 1)
            done += width
        return out

    def _first(self, width: int, length: int) -> int:
        """The first token that the first of ``width`` new ones looks at."""
        return 0 if self._window is None else max(0, length - width + 1 - self._window)

    def _causal(self, width: int, length: int) -> Tensor | None:
        """[width x J, T]: what the new tokens of a row look at; None where that is all."""
        if width == 1 or self._step.together:
            return None
        seen_T = torch.arange(self._first(width, length), length)
        ends_W1 = torch.arange(length - width, length)[:, None]
        mask_WT = seen_T <= ends_W1
        if self._window is not None:
            mask_WT &= seen_T > ends_W1 - self._window
        return mask_WT.repeat_interleave(self._repeats, dim=0)

    def _made_mask(self) -> Tensor | None:
        """[B, 1, 1, T], added to scores; None where every row looks at all tokens."""
        longest, lengths_B1 = max(self._step.lengths), torch.tensor(self._step.lengths)[:, None]
        first_B1 = lengths_B1 - (longest if self._window is None else self._window)
        if min(self._step.lengths) == longest and bool((first_B1 <= 0).all()):
            return None
        seen_T = torch.arange(longest)
        hidden_BT = (seen_T >= lengths_B1) | (seen_T < first_B1)
        dtype = self._rows.stores[0].dtype
        mask_BT = torch.zeros(hidden_BT.shape, dtype=dtype).masked_fill_(hidden_BT, -torch.inf)
        return mask_BT[:, None, None]
