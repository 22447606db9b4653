"""What the training datasets need to know about tokens on disk, and about each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt


class TokenSource(Protocol):
    """Sequences of token ids that can be read in part.

    sizes: int32 [sequences], length of every sequence in tokens.
    document_indices: int64 [documents + 1], sequence index at which each document begins;
    the last entry is the number of sequences.
    """

    @property
    def dtype(self) -> np.dtype[np.generic]: ...

    @property
    def sizes(self) -> npt.NDArray[np.int32]: ...

    @property
    def document_indices(self) -> npt.NDArray[np.int64]: ...

    def __len__(self) -> int:
        """Number of sequences."""
        ...

    def get(self, i: int, offset: int = 0, length: int | None = None) -> npt.NDArray[np.generic]:
        """``length`` ids of sequence ``i`` from ``offset`` (to its end if None)."""
        ...


class Piece(NamedTuple):
    """A part of a sample: ``length`` tokens of sequence ``sequence`` from ``offset``."""

    sequence: int
    offset: int
    length: int


class SampleDataset(Protocol):
    """An ordered list of training samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, k: int) -> dict[str, npt.NDArray[np.generic]]:
        """``tokens`` int64 [S], ``labels`` int64 and ``loss_mask`` float32 of one length, and
        what else the model's family needs."""
        ...

    def documents_of(self, k: int) -> list[Piece]:
        """Where the tokens of sample ``k`` come from, in order."""
        ...

    def source_of(self, k: int) -> str:
        """Name of the dataset that sample ``k`` comes from."""
        ...


SourceOpener = Callable[[Path], TokenSource]
Notify = Callable[[str], None]


def ignore(message: str) -> None:
    """The :data:`Notify` of a caller who does not care."""
    del message
