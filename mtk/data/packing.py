"""Documents that share a sample: where each of them begins, as Megatron-core sees it.

A document ends with its end-of-document token (EOD), which still belongs to it. What stands
first in a sample may be the rest of a document. Shape suffixes: B samples, S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Which consequences the end of a document has inside a sample.

    eod: id of the end-of-document token. attention: tokens look back inside their own
    document only (``--reset-attention-mask``). positions: they begin again at 0 after each
    EOD (``--reset-position-ids``).
    """

    eod: int
    attention: bool
    positions: bool

    def documents(self, tokens_BS: Tensor) -> Tensor | None:
        """int64 [B, S]: the number of each token's document in its sample, from 0 on."""
        return document_numbers(tokens_BS, self.eod) if self.attention else None

    def position_ids(self, tokens_BS: Tensor) -> Tensor | None:
        """int64 [B, S]: each token's place in its document (in the sample, for the first)."""
        if not self.positions:
            return None
        places_S = torch.arange(tokens_BS.shape[1])
        begins_BS = _first_of_document(tokens_BS, self.eod)
        starts_BS = torch.where(begins_BS, places_S, 0).cummax(dim=1).values
        return places_S - starts_BS


def document_numbers(tokens_BS: Tensor, eod: int) -> Tensor:
    """int64 [B, S]: how many EODs stand before each token."""
    return _first_of_document(tokens_BS, eod).cumsum(dim=1)


def _first_of_document(tokens_BS: Tensor, eod: int) -> Tensor:
    """bool [B, S]: the token before is an EOD."""
    first_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
    first_BS[:, 1:] = tokens_BS[:, :-1] == eod
    return first_BS
