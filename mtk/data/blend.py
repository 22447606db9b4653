"""Several datasets as one: the ``[WEIGHT] PREFIX ...`` grammar and the blended dataset."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mtk.data.blend_indices import (
    MOST_DATASETS,
    BlendIndices,
    blending_indices,
    exhaustive_blending_indices,
)
from mtk.data.index_cache import Arrays, IndexCache
from mtk.data.token_source import Piece, SampleDataset
from mtk.errors import DataError

# Megatron-core builds each dataset of a blend this much larger than its share.
SURPLUS = 0.005


@dataclass(frozen=True)
class Blend:
    """Dataset prefixes and, if given, their weights."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None

    @property
    def normalized(self) -> npt.NDArray[np.float64]:
        """Weights divided by their sum. ValueError if there are none."""
        if self.weights is None:
            raise ValueError("the blend has no weights")
        weights = np.array(self.weights, dtype=np.float64)
        return np.asarray(weights / weights.sum())


def parse_blend(items: Sequence[str], option: str = "--data-path") -> Blend:
    """Read ``P ...`` or ``W P W P ...``.

    An odd number of items are prefixes; of an even number every other one is a weight if all
    of them are numbers, and all are prefixes if none is. Raises DataError for a mixture and
    for weights that are not above zero.
    """
    if not items:
        raise DataError(f"{option} is empty: give a dataset prefix.")
    first = [_number(item) for item in items[::2]]
    if len(items) % 2 or all(weight is None for weight in first):
        return _checked(Blend(tuple(item.strip() for item in items), None), option)
    weights = []
    for position, (item, weight) in enumerate(zip(items[::2], first, strict=True)):
        if weight is None:
            raise DataError(
                f"{option}: item {2 * position + 1}, {item!r}, stands where a weight should be, "
                f"but is no number, while others there are. Give WEIGHT PREFIX pairs, or prefixes "
                f"only (of an even number none in odd place may look like a number: write ./7)."
            )
        if not (weight > 0 and math.isfinite(weight)):
            raise DataError(
                f"{option}: the weight {item} of {items[2 * position + 1]} must be above zero. "
                f"Leave the dataset out instead."
            )
        weights.append(weight)
    return _checked(Blend(tuple(item.strip() for item in items[1::2]), tuple(weights)), option)


def target_sizes(weights: npt.NDArray[np.float64], size: int) -> list[int]:
    """Samples each dataset gives to a blend of ``size``; they sum to slightly more."""
    return [math.ceil(size * weight) for weight in weights.tolist()]


def with_surplus(sizes: Sequence[int]) -> list[int]:
    """Samples to build of each dataset, so that rounding never asks for one too many."""
    return [math.ceil(size * (1 + SURPLUS)) for size in sizes]


class BlendedDataset:
    """Samples of several datasets in the order of :mod:`mtk.data.blend_indices`.

    indices: from :func:`blend_index`. Raises DataError where they ask a dataset for more
    samples than it has.
    """

    def __init__(self, datasets: Sequence[SampleDataset], indices: BlendIndices) -> None:
        self.datasets = tuple(datasets)
        self._indices = indices
        wanted = indices.counts(len(self.datasets))
        for dataset, count in zip(self.datasets, wanted.tolist(), strict=True):
            if count > len(dataset):
                raise DataError(
                    f"{dataset.source_of(0)}: the blend asks for {count} samples of {len(dataset)}."
                    f" Lower its weight or the training length, or use --data-order epochs, which "
                    f"repeats datasets as often as needed."
                )

    def __len__(self) -> int:
        return len(self._indices.dataset)

    def __getitem__(self, k: int) -> dict[str, npt.NDArray[np.generic]]:
        """As of the dataset that gives sample ``k``, with ``dataset_id``, an int64 scalar."""
        dataset, sample = self.locate(k)
        return {**self.datasets[dataset][sample], "dataset_id": np.array(dataset, dtype=np.int64)}

    def locate(self, k: int) -> tuple[int, int]:
        """Which dataset gives sample ``k``, and which of its samples that is."""
        if not 0 <= k < len(self):
            raise IndexError(f"sample {k} of {len(self)}")
        return int(self._indices.dataset[k]), int(self._indices.sample[k])

    def documents_of(self, k: int) -> list[Piece]:
        dataset, sample = self.locate(k)
        return self.datasets[dataset].documents_of(sample)

    def source_of(self, k: int) -> str:
        dataset, sample = self.locate(k)
        return self.datasets[dataset].source_of(sample)


def blend_index(
    weights: npt.NDArray[np.float64] | npt.NDArray[np.int64],
    size: int | None,
    cache: IndexCache | None,
) -> BlendIndices:
    """Blending indices, from the cache if it has them.

    float64 weights are divided by their sum (again, if they were already: Megatron-core does
    so, and the last bit decides ties); int64 ones are lengths. size: None draws every sample of
    every dataset once, and needs lengths.
    """
    lengths = weights.astype(np.int64) if weights.dtype == np.int64 else None
    shares = weights / np.float64(weights.sum())

    def build() -> Arrays:
        if size is not None:
            found = blending_indices(shares, size)
        elif lengths is not None:
            found = exhaustive_blending_indices(lengths)
        else:
            raise ValueError("a blend by weights needs a size")
        return {"dataset": found.dataset, "sample": found.sample}

    if cache is None:
        return _from_arrays(build())
    # Hexadecimal: a weight must come back as exactly the same number.
    description = {"weights": [float(w).hex() for w in weights.tolist()], "size": size}
    return _from_arrays(cache.load_or_build("blend", description, build))


def _from_arrays(arrays: dict[str, Any]) -> BlendIndices:
    return BlendIndices(arrays["dataset"], arrays["sample"])


def _checked(blend: Blend, option: str) -> Blend:
    if not all(blend.prefixes):
        raise DataError(f"{option}: a dataset prefix is empty.")
    if len(blend.prefixes) > MOST_DATASETS:
        count = len(blend.prefixes)
        raise DataError(f"{option}: {count} datasets; a blend takes at most {MOST_DATASETS}.")
    return blend


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
