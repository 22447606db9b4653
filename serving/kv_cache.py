"""Keys and values of all running sequences, one dense row a sequence.

Rows 0..n-1 are in use; a freed row is filled by moving the last one into it, so that a
decode step reads a plain slice. Storage grows with the longest sequence and the number of
rows, in steps. An engine with paged blocks replaces this module, not its callers.

Shape suffixes: R rows, G key/value heads, S new tokens, T all tokens, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from serving.state_cache import StateStore, StateView

LENGTH_STEP = 64


class LayerStore:
    """Storage of one layer, made at first use in the dtype and place of the keys."""

    def __init__(self) -> None:
        self.keys_RGTD: Tensor | None = None
        self.values_RGTD: Tensor | None = None

    def reserve(self, like: Tensor, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Storage of at least [rows, G, length, D]; keeps what is there."""
        if self.keys_RGTD is None or self.values_RGTD is None:
            shape = (rows, like.shape[1], length, like.shape[3])
            self.keys_RGTD, self.values_RGTD = like.new_zeros(shape), like.new_zeros(shape)
        self.keys_RGTD = _grown(self.keys_RGTD, rows, length)
        self.values_RGTD = _grown(self.values_RGTD, rows, length)
        return self.keys_RGTD, self.values_RGTD

    def take_rows(self, rows: Sequence[int]) -> None:
        if self.keys_RGTD is not None and self.values_RGTD is not None:
            index = torch.tensor(rows, device=self.keys_RGTD.device)
            self.keys_RGTD = self.keys_RGTD.index_select(0, index)
            self.values_RGTD = self.values_RGTD.index_select(0, index)

    def write_row(self, row: int, k_BGSD: Tensor, v_BGSD: Tensor, *, rows: int) -> None:
        """The whole of ``row``, in storage of at least ``rows`` rows; B is 1."""
        length = k_BGSD.shape[2]
        keys, values = self.reserve(k_BGSD, rows, _stepped(length))
        for store_RGTD, new_BGSD in ((keys, k_BGSD), (values, v_BGSD)):
            store_RGTD[row, :, :length] = new_BGSD[0]
            _clear_from(store_RGTD, row, length)

    def exchange_rows(self, one: int, other: int) -> None:
        if self.keys_RGTD is not None and self.values_RGTD is not None:
            for store_RGTD in (self.keys_RGTD, self.values_RGTD):
                kept = store_RGTD[one].clone()
                store_RGTD[one] = store_RGTD[other]
                store_RGTD[other] = kept

    def copy_row(self, source: int, target: int, length: int) -> None:
        if self.keys_RGTD is not None and self.values_RGTD is not None:
            for store_RGTD in (self.keys_RGTD, self.values_RGTD):
                store_RGTD[target, :, :length] = store_RGTD[source, :, :length]
                _clear_from(store_RGTD, target, length)


def _grown(store_RGTD: Tensor, rows: int, length: int) -> Tensor:
    old_rows, heads, old_length, width = store_RGTD.shape
    if rows <= old_rows and length <= old_length:
        return store_RGTD
    grown = store_RGTD.new_zeros(max(rows, old_rows), heads, max(length, old_length), width)
    grown[:old_rows, :, :old_length] = store_RGTD
    return grown


def _clear_from(store_RGTD: Tensor, row: int, length: int) -> None:
    """Zeros behind a row's tokens. A mask does not hide NaN that an earlier sequence left
    there: attention multiplies it by zero, which is NaN again."""
    store_RGTD[row, :, length:] = 0


class _PrefillView:
    """Appends S tokens to one row."""

    def __init__(self, store: LayerStore, row: int, start: int) -> None:
        self._store, self._row, self._start = store, row, start

    def update(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        end = self._start + k_BGSD.shape[2]
        keys, values = self._store.reserve(k_BGSD, doubled(self._row + 1), _stepped(end))
        keys[self._row, :, self._start : end] = k_BGSD[0]
        values[self._row, :, self._start : end] = v_BGSD[0]
        _clear_from(keys, self._row, end)
        _clear_from(values, self._row, end)
        row = slice(self._row, self._row + 1)
        return keys[row, :, :end], values[row, :, :end]


class _DecodeView:
    """Appends one token to each of the first n rows, at each row's own position."""

    def __init__(self, store: LayerStore, positions_R: Tensor, longest: int) -> None:
        self._store, self._positions_R, self._longest = store, positions_R, longest

    def update(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        count = k_BGSD.shape[0]
        keys, values = self._store.reserve(k_BGSD, count, _stepped(self._longest))
        rows_R = torch.arange(count, device=k_BGSD.device)
        keys[rows_R, :, self._positions_R] = k_BGSD[:, :, 0]
        values[rows_R, :, self._positions_R] = v_BGSD[:, :, 0]
        return keys[:count, :, : self._longest], values[:count, :, : self._longest]


def _stepped(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def doubled(rows: int) -> int:
    """The next power of two, so that a growing batch is copied rarely."""
    return 1 << (rows - 1).bit_length()


class KVCache:
    """Caches of all layers. lengths: tokens held by each row in use.

    stateful: layers that keep a state instead of keys and values (Mamba).
    """

    def __init__(self, num_layers: int, stateful: Collection[int] = ()) -> None:
        self._layers: list[LayerStore | StateStore] = [
            StateStore() if layer in stateful else LayerStore() for layer in range(num_layers)
        ]
        self.lengths: list[int] = []

    @property
    def tokens(self) -> int:
        """Tokens held by all rows."""
        return sum(self.lengths)

    def add_row(self) -> int:
        self.lengths.append(0)
        return len(self.lengths) - 1

    def free_row(self, row: int) -> int:
        """Free ``row``; the last row moves into its place. Returns the row that moved."""
        last = len(self.lengths) - 1
        if row != last:
            for layer in self._layers:
                layer.copy_row(last, row, self.lengths[last])
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        return last

    def select_rows(self, rows: Sequence[int]) -> None:
        """Row i becomes a copy of ``rows[i]`` (for beams)."""
        for layer in self._layers:
            layer.take_rows(rows)
        self.lengths = [self.lengths[row] for row in rows]

    def prefill_views(self, row: int) -> list[_PrefillView | StateView]:
        start, reserve = self.lengths[row], doubled(row + 1)
        return [
            StateView(layer, row, row + 1, fresh=start == 0, reserve=reserve)
            if isinstance(layer, StateStore)
            else _PrefillView(layer, row, start)
            for layer in self._layers
        ]

    def decode_views(self, positions_R: Tensor) -> list[_DecodeView | StateView]:
        longest, rows = max(self.lengths) + 1, len(self.lengths)
        return [
            StateView(layer, 0, rows, fresh=False, reserve=rows)
            if isinstance(layer, StateStore)
            else _DecodeView(layer, positions_R, longest)
            for layer in self._layers
        ]
