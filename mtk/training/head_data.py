"""Samples of RACE, MNLI and QQP for BERT. Shape suffixes: C sequences of a sample, S sequence."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mtk.data.provenance import Origin
from mtk.data.token_source import Piece
from mtk.errors import DataError
from mtk.evaluation.classification import ClassificationData


class HeadSamples:
    """The samples of one or several files, one after the other. vocab_size: of the model; ids
    beyond it are refused when they are read (DataError)."""

    def __init__(self, parts: list[ClassificationData], vocab_size: int | None = None) -> None:
        self._parts, self._vocab_size = parts, vocab_size
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, k: int) -> dict[str, npt.NDArray[np.generic]]:
        """``tokens``, ``types``, ``documents`` (padding is another one) int64 [C, S]; ``label``,
        ``place`` (in its file) int64 and ``counted`` float32, scalars. ``labels`` and
        ``loss_mask`` are not used."""
        part, within = self._place(k)
        sample = self._parts[part][within]
        highest = int(sample.text.max())
        if self._vocab_size is not None and highest >= self._vocab_size:
            raise DataError(
                f"{self.source_of(k)} holds id {highest}, but the model has {self._vocab_size} "
                f"ids: the checkpoint's tokenizer does not belong to its weights."
            )
        documents_CS = 1 - sample.mask
        return {
            "tokens": sample.text,
            "labels": sample.text,
            "loss_mask": sample.mask.astype(np.float32),
            "documents": documents_CS,
            # Nothing looks at padding; its published types need not exist in the model.
            "types": sample.types * sample.mask,
            "label": np.array(sample.label, dtype=np.int64),
            "place": np.array(within, dtype=np.int64),
            "counted": np.array(1.0, dtype=np.float32),
        }

    def documents_of(self, k: int) -> list[Piece]:
        del k
        return []

    def origins_of(self, k: int) -> list[Origin]:
        """Where the sample was read."""
        file, _, line = self.source_of(k).rpartition(":")
        return [Origin(file, "line", int(line), -1, -1)] if line.isdecimal() else []

    def source_of(self, k: int) -> str:
        part, within = self._place(k)
        return self._parts[part].origin(within)

    def _place(self, k: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, k, side="right"))
        return part, k - int(self._ends[part - 1] if part else 0)
