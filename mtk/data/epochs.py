"""A dataset seen several times, shuffled anew each time.

The order of an epoch depends on the seed and its number only, neither on how many epochs there
will be nor on ranks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mtk.data.provenance import Origin, origins_of
from mtk.data.token_source import Piece, SampleDataset

# What says how much a sample counts, by the name of its field.
WEIGHTS = ("loss_mask", "counted")


class ShuffledEpochs:
    """``count`` samples in the order of training; those after them fill the last step up and
    count nothing."""

    def __init__(self, dataset: SampleDataset, count: int, seed: int) -> None:
        self._dataset, self._count, self._seed = dataset, count, seed
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, k: int) -> dict[str, npt.NDArray[np.generic]]:
        sample = self._dataset[self.place(k)]
        if k < self._count:
            return sample
        blank = {name: np.zeros_like(sample[name]) for name in WEIGHTS if name in sample}
        return {**sample, **blank}

    def place(self, k: int) -> int:
        """Which sample of the dataset comes ``k``-th."""
        epoch, within = divmod(k, len(self._dataset))
        if epoch != self._epoch:
            state = np.random.RandomState([self._seed, epoch])
            self._epoch, self._order = epoch, state.permutation(len(self._dataset))
        return int(self._order[within])

    def documents_of(self, k: int) -> list[Piece]:
        return self._dataset.documents_of(self.place(k))

    def origins_of(self, k: int) -> list[Origin]:
        """Where the sample was read, if the dataset knows it; [] otherwise."""
        return origins_of(self._dataset, self.place(k))

    def source_of(self, k: int) -> str:
        return self._dataset.source_of(self.place(k))
