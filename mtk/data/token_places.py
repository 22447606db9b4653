"""From the sequences of a sample to the documents that they are parts of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mtk.data.token_source import Piece, TokenSource


@dataclass(frozen=True)
class DocumentPart:
    """Tokens ``begin`` .. ``end`` (exclusive) of a document that has ``size`` tokens. document:
    its number in the dataset, from 0."""

    document: int
    begin: int
    end: int
    size: int


def document_parts(source: TokenSource, pieces: Iterable[Piece]) -> list[DocumentPart]:
    """What pieces are of their documents, in order; sentences that follow each other are one."""
    starts, sizes = source.document_indices, source.sizes
    parts: list[DocumentPart] = []
    for piece in pieces:
        # Empty documents begin where the next one does: the last of them has the sequence.
        document = int(np.searchsorted(starts, piece.sequence, side="right")) - 1
        first, last = int(starts[document]), int(starts[document + 1])
        begin = int(sizes[first : piece.sequence].sum(dtype=np.int64)) + piece.offset
        end = begin + piece.length
        before = parts[-1] if parts else None
        if before is not None and (before.document, before.end) == (document, begin):
            parts[-1] = DocumentPart(document, before.begin, end, before.size)
        else:
            size = int(sizes[first:last].sum(dtype=np.int64))
            parts.append(DocumentPart(document, begin, end, size))
    return parts
