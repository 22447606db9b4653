"""Token ids that lie outside the vocabulary are refused where they are read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mtk.data.token_source import Piece, TokenSource
from mtk.errors import DataError


def read_piece(source: TokenSource, piece: Piece, name: str) -> npt.NDArray[np.generic]:
    """The ids of a piece. Raises DataError, with the dataset's name, if there are fewer."""
    ids = source.get(piece.sequence, offset=piece.offset, length=piece.length)
    if len(ids) != piece.length:
        raise DataError(
            f"{name}: sequence {piece.sequence} has {len(ids)} tokens from {piece.offset} on "
            f"where its index promises {piece.length}. The data files do not belong together or "
            f"are cut off; preprocess again."
        )
    return ids


def check_ids(
    ids: npt.NDArray[np.generic], piece: Piece, source: TokenSource, name: str, vocab_size: int
) -> None:
    """Raise DataError for the first id of a piece that is not below ``vocab_size``."""
    numbers = ids.astype(np.int64, copy=False)
    wrong = np.flatnonzero((numbers < 0) | (numbers >= vocab_size))
    if len(wrong):
        at = int(wrong[0])
        starts = source.document_indices
        document = int(np.searchsorted(starts, piece.sequence, side="right")) - 1
        raise DataError(
            f"{name}: document {document} (sequence {piece.sequence}), token {piece.offset + at} "
            f"has id {int(numbers[at])}, but the model's vocabulary has {vocab_size} ids. "
            f"Preprocess with the model's tokenizer, or raise --vocab-size."
        )
