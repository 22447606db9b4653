"""Samples of conversations: packed several to a sample, or one each, padded.

Each conversation of n ids gives n - 1 places: every id but the last is read, every one but the
first is predicted. Shape suffix: S tokens of a sample.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mtk.data.chat_corpus import ChatCorpus
from mtk.data.first_fit import first_fit
from mtk.data.provenance import Origin
from mtk.data.token_source import Piece


class ChatDataset:
    """An ordered list of samples of ``length`` tokens.

    pad: id of places that hold nothing; they count nowhere. packing: first-fit in the order of
    the files, so that what shares a sample never depends on ranks or epochs; tokens look at
    their own conversation only (``documents``), and ``positions`` begin at 0 in each.
    """

    def __init__(self, corpus: ChatCorpus, length: int, pad: int, *, packing: bool) -> None:
        self._corpus, self._length, self._pad = corpus, length, pad
        self._packing = packing
        sizes = (np.diff(corpus.starts_C) - 1).tolist()
        self.samples = first_fit(sizes, length) if packing else [[n] for n in range(len(sizes))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, k: int) -> dict[str, npt.NDArray[np.generic]]:
        """``tokens``, ``labels`` int64 [S], ``loss_mask`` float32 [S]; packed also
        ``documents`` and ``positions`` int64 [S]."""
        tokens_S = np.full(self._length, self._pad, dtype=np.int64)
        labels_S = np.full(self._length, self._pad, dtype=np.int64)
        loss_mask_S = np.zeros(self._length, dtype=np.float32)
        documents_S = np.full(self._length, len(self.samples[k]), dtype=np.int64)
        positions_S = np.zeros(self._length, dtype=np.int64)
        end = 0
        for number, index in enumerate(self.samples[k]):
            ids, counted = self._corpus.conversation(index)
            start, end = end, end + len(ids) - 1
            tokens_S[start:end], labels_S[start:end] = ids[:-1], ids[1:]
            loss_mask_S[start:end] = counted[1:]
            documents_S[start:end] = number
            positions_S[start:end] = np.arange(end - start)
        positions_S[end:] = np.arange(self._length - end)
        sample: dict[str, npt.NDArray[np.generic]]
        sample = {"tokens": tokens_S, "labels": labels_S, "loss_mask": loss_mask_S}
        if self._packing:
            sample |= {"documents": documents_S, "positions": positions_S}
        return sample

    def documents_of(self, k: int) -> list[Piece]:
        """The conversations of sample ``k``, by their number in the files."""
        starts = self._corpus.starts_C
        return [Piece(n, 0, int(starts[n + 1] - starts[n])) for n in self.samples[k]]

    def origins_of(self, k: int) -> list[Origin]:
        """Where each of these conversations was read."""
        return [self._corpus.origin(index) for index in self.samples[k]]

    def source_of(self, k: int) -> str:
        del k
        return "conversations"

    @property
    def filled(self) -> float:
        """Share of all places that hold a token."""
        used = int(self._corpus.starts_C[-1]) - len(self._corpus)
        return used / (len(self) * self._length)
