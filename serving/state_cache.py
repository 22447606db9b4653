"""States of all running sequences in one Mamba layer, one row a sequence.

Of constant size however long a sequence is. A state is that of its last token only, so that a
row is begun anew, moved or copied, but never cut back; nothing that pads a prompt may enter it
(prompts are read one by one, without padding).

Shape suffixes: R rows, W inputs of the convolutions that are kept, C their channels, H heads,
P channels of a head, N state of a channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class StateStore:
    """Storage of one layer, made at first use."""

    def __init__(self) -> None:
        self.inputs_RWC: Tensor | None = None
        self.states_RHPN: Tensor | None = None

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        """Of rows ``start`` to ``stop``; they must have been written before."""
        if self.inputs_RWC is None or self.states_RHPN is None:
            return None
        return self.inputs_RWC[start:stop], self.states_RHPN[start:stop]

    def write(self, start: int, rows: int, inputs_BWC: Tensor, states_BHPN: Tensor) -> None:
        """Set rows from ``start`` on, in storage of at least ``rows`` rows."""
        self.inputs_RWC = _grown(self.inputs_RWC, rows, inputs_BWC)
        self.states_RHPN = _grown(self.states_RHPN, rows, states_BHPN)
        stop = start + inputs_BWC.shape[0]
        self.inputs_RWC[start:stop] = inputs_BWC
        self.states_RHPN[start:stop] = states_BHPN

    def take_rows(self, rows: Sequence[int]) -> None:
        if self.inputs_RWC is not None and self.states_RHPN is not None:
            index = torch.tensor(rows, device=self.inputs_RWC.device)
            self.inputs_RWC = self.inputs_RWC.index_select(0, index)
            self.states_RHPN = self.states_RHPN.index_select(0, index)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """``length`` is of no meaning here; a state has one size."""
        del length
        if self.inputs_RWC is not None and self.states_RHPN is not None:
            for store in (self.inputs_RWC, self.states_RHPN):
                store[target] = store[source]


class StateView:
    """Some rows as one layer sees them in one forward pass (a ``StateCache``).

    fresh: the rows hold no token yet; whatever an earlier sequence left there does not count.
    reserve: rows of storage to have afterwards.
    """

    def __init__(
        self, store: StateStore, start: int, stop: int, *, fresh: bool, reserve: int
    ) -> None:
        self._store, self._start, self._stop = store, start, stop
        self._fresh, self._reserve = fresh, reserve

    def read(self) -> tuple[Tensor, Tensor] | None:
        return None if self._fresh else self._store.read(self._start, self._stop)

    def write(self, inputs: Tensor, state: Tensor) -> None:
        self._store.write(self._start, self._reserve, inputs, state)


def _grown(store: Tensor | None, rows: int, like: Tensor) -> Tensor:
    """At least ``rows`` rows; keeps what is there."""
    have = 0 if store is None else store.shape[0]
    if store is not None and have >= rows:
        return store
    grown = like.new_zeros(rows, *like.shape[1:])
    if store is not None:
        grown[:have] = store
    return grown
