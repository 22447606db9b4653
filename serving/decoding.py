"""What batches, beam searches and probes use of a model that runs sequences row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from serving.requests import TokenLogprob


class RowCache(Protocol):
    """Rows that come and go between steps; what they hold is the decoder's own matter."""

    @property
    def tokens(self) -> int:
        """Tokens held by all rows."""

    def add_row(self) -> int: ...
    def free_row(self, row: int) -> int:
        """Free ``row``; the last row moves into its place. Returns the row that moved."""

    def select_rows(self, rows: Sequence[int]) -> None:
        """Row i becomes a copy of ``rows[i]`` (for beams)."""


class SequenceDecoder(Protocol):
    """A model with the caches of the sequences that run on it. Row i of every call is row i of
    ``cache``."""

    @property
    def cache(self) -> RowCache: ...

    def prefill(
        self, row: int, prompt: Sequence[int], *, score_top: int | None = None
    ) -> tuple[Tensor, list[TokenLogprob]]:
        """Read a prompt into an empty row: the logits [V] of the first new token and, if
        ``score_top`` is a number, log-probabilities of prompt tokens 1.. with so many others."""

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row; the logits [B, V] of the next ones."""
