"""NullTokenizer: text is already numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from mtk.errors import DataError
from mtk.tokenizers.base import Tokenizer


class NullTokenizer(Tokenizer):
    """Text is whitespace-separated integers.

    Megatron releases differ. Followed here: up to core 0.17 ``--vocab-size V`` gives the
    vocabulary V + 1 and EOD V. With ``--null-tokenizer-eod-id`` the form of 0.18 and
    later: vocabulary V and that EOD.

    options: vocab_size (V), eod (or null).
    """

    kind: ClassVar[str] = "NullTokenizer"

    def __init__(self, options: dict[str, int | None]) -> None:
        super().__init__(options, {})
        size = options["vocab_size"]
        eod = options["eod"]
        if size is None:
            raise ValueError("NullTokenizer needs vocab_size")
        self._vocab_size = size + 1 if eod is None else size
        self.eod = size if eod is None else eod

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def encode(self, text: str) -> list[int]:
        """Raises DataError for anything but integers inside the vocabulary."""
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise DataError(f"NullTokenizer reads integers: {error}.") from None
        for token in ids:
            if not 0 <= token < self._vocab_size:
                raise DataError(
                    f"NullTokenizer: {token} lies outside the vocabulary of {self._vocab_size}."
                )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in ids)

    def piece(self, token_id: int) -> str:
        return str(token_id)
