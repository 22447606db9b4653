"""Training, validation and test samples from the data options of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtk.config.pretrain import DataConfig
from mtk.data.blend import (
    Blend,
    BlendedDataset,
    blend_index,
    parse_blend,
    target_sizes,
    with_surplus,
)
from mtk.data.gpt_indices import IntArray
from mtk.data.index_cache import IndexCache
from mtk.data.sample_kind import Part, SampleKind
from mtk.data.splits import SPLITS, SplitName, require_units, split_ranges
from mtk.data.token_source import Notify, SampleDataset, SourceOpener, TokenSource, ignore
from mtk.errors import DataError

MOCK = "mock data"
MOCK_SPLIT = "1,1,1"
WHOLE = {"train": "1,0,0", "valid": "0,1,0", "test": "0,0,1"}


@dataclass(frozen=True)
class SampleCounts:
    """Samples that are needed of each split: for training those of the whole run, for
    evaluation one fixed set (``eval_iters`` global batches). 0: the split is not needed."""

    train: int
    valid: int = 0
    test: int = 0

    def of(self, split: SplitName) -> int:
        return {"train": self.train, "valid": self.valid, "test": self.test}[split]


@dataclass(frozen=True)
class Splits:
    """Datasets of at least the samples asked for; take the first ones. A held-out split that
    has fewer is one epoch of what there is. None where a split was not asked for, or its
    share or path was not given."""

    train: SampleDataset | None
    valid: SampleDataset | None
    test: SampleDataset | None


class SplitBuilder:
    """Opens every prefix once and builds the datasets of all splits.

    kind: how samples are made. open_source: reader of one prefix. cache_path: folder of the
    index caches; None is ``{prefix}.cache`` beside each dataset.
    """

    def __init__(
        self,
        config: DataConfig,
        kind: SampleKind,
        counts: SampleCounts,
        open_source: SourceOpener,
        *,
        cache_path: Path | None = None,
        notify: Notify = ignore,
    ) -> None:
        self._config = config
        self._kind = kind
        self._counts = counts
        self._open_source = open_source
        self._cache_path = cache_path
        self._notify = notify
        self._opened: dict[str, TokenSource] = {}

    def build(self) -> Splits:
        """The datasets of all splits that are asked for. Raises DataError and ConfigError."""
        train, valid, test = (self._split(name) for name in SPLITS)
        if train is None and self._counts.train:
            raise DataError(
                "There is no training data: give --train-data-path, or --data-path with a share "
                "above zero for training in --split."
            )
        return Splits(train, valid, test)

    def _split(self, split: SplitName) -> SampleDataset | None:
        needed = self._counts.of(split)
        if not needed:
            return None
        if self._config.mock_data:
            return self._single(self._mock_part(split), split, needed)
        items, option, shares = self._where(split)
        if not items:
            self._notify(f"no {option}: there is no {split} split")
            return None
        blend = parse_blend(items, option)
        parts = [self._part(prefix, split, shares) for prefix in blend.prefixes]
        present = [part for part in parts if part is not None]
        if not present:
            return None  # the share of this split is zero, for all datasets alike
        # Megatron-core does not blend a single prefix per split, but a weighted one it does.
        alone = len(present) == 1 and (blend.weights is None or option != "--data-path")
        if alone:
            return self._single(present[0], split, needed)
        return self._blended(present, blend, needed)

    def _where(self, split: SplitName) -> tuple[Sequence[str], str, str]:
        config = self._config
        if config.data_path:
            return config.data_path, "--data-path", config.split
        items = {
            "train": config.train_data_path,
            "valid": config.valid_data_path,
            "test": config.test_data_path,
        }[split]
        return items, f"--{split}-data-path", WHOLE[split]

    def _part(self, prefix: str, split: SplitName, shares: str) -> Part | None:
        if prefix not in self._opened:
            self._opened[prefix] = self._open_source(Path(prefix))
        source = self._opened[prefix]
        count, unit = self._kind.count(source), self._kind.unit
        units = split_ranges(shares, count)[SPLITS.index(split)]
        if units is None:
            return None
        if not count:
            raise DataError(f"{prefix}: the dataset is empty. Preprocess some text.")
        require_units(units, split, shares, count, prefix, unit)
        folder = self._cache_path or Path(f"{prefix}.cache")
        part = Part(prefix, source, units, IndexCache(folder, notify=self._notify))
        divided = self._config.data_path and len(units) < count
        share = f", raise its share in --split {shares}" if divided else ""
        self._kind.require_sample(part, split, share)
        return part

    def _mock_part(self, split: SplitName) -> Part:
        if MOCK not in self._opened:
            self._opened[MOCK] = self._kind.mock()
        source = self._opened[MOCK]
        units = split_ranges(MOCK_SPLIT, self._kind.count(source))[SPLITS.index(split)]
        return Part(MOCK, source, units or range(0), None)

    def _single(self, part: Part, split: SplitName, needed: int) -> SampleDataset:
        if split == "train":
            return self._kind.dataset(part, needed)
        one_epoch = self._kind.one_epoch(part)
        if one_epoch >= needed:
            return self._kind.dataset(part, needed)
        self._notify(
            f"{part.name}: the {split} split has {one_epoch} samples, fewer than the {needed} "
            f"asked for; each of them is evaluated once"
        )
        return self._kind.dataset(part, None)

    def _blended(self, parts: Sequence[Part], blend: Blend, needed: int) -> BlendedDataset:
        cache = parts[0].cache
        if blend.weights is not None:
            targets = target_sizes(blend.normalized, needed)
            indices = blend_index(blend.normalized, sum(targets), cache)
            sizes: list[int] | list[None] = with_surplus(targets)
        else:
            lengths = np.array([self._kind.one_epoch(part) for part in parts], dtype=np.int64)
            indices = blend_index(lengths, self._unweighted_size(lengths, needed), cache)
            sizes = [None] * len(parts)
        if self._config.data_order == "epochs":
            # What is drawn is known, and an order by epochs does not change with it.
            sizes = [max(1, count) for count in indices.counts(len(parts)).tolist()]
        datasets = [self._kind.dataset(p, size) for p, size in zip(parts, sizes, strict=True)]
        return BlendedDataset(datasets, indices)

    def _unweighted_size(self, lengths: IntArray, needed: int) -> int:
        """Megatron-core draws every dataset at most once; ``epochs`` begins again."""
        available = int(lengths.sum())
        if self._config.data_order == "epochs" or needed <= available:
            return needed
        names = ", ".join(sorted(self._opened))
        raise DataError(
            f"{needed} samples are needed, but {names} have {available}, and without weights "
            f"Megatron-core's order takes each only once. Give WEIGHT PREFIX pairs, use "
            f"--data-order epochs, or lower the training length or --eval-iters."
        )


def build_splits(
    config: DataConfig,
    kind: SampleKind,
    counts: SampleCounts,
    open_source: SourceOpener,
    *,
    cache_path: Path | None = None,
    notify: Notify = ignore,
) -> Splits:
    """The datasets of a run; arguments as of :class:`SplitBuilder`."""
    cache = cache_path or (Path(config.data_cache_path) if config.data_cache_path else None)
    builder = SplitBuilder(config, kind, counts, open_source, cache_path=cache, notify=notify)
    return builder.build()
