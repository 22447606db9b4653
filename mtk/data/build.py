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
from mtk.data.gpt_dataset import GPTDataset
from mtk.data.gpt_indices import IntArray
from mtk.data.index_cache import IndexCache
from mtk.data.mock import MockSource
from mtk.data.splits import SPLITS, SplitName, require_sequences, split_ranges
from mtk.data.token_source import Notify, SampleDataset, SourceOpener, TokenSource, ignore
from mtk.errors import ConfigError, DataError, Problem

MOCK = "mock data"
NEED_EOD = ("eod_mask_loss", "reset_attention_mask", "reset_position_ids")
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


@dataclass(frozen=True)
class _Part:
    """The sequences of one split of one dataset."""

    name: str
    source: TokenSource
    sequences: range
    cache: IndexCache | None

    @property
    def documents(self) -> IntArray:
        return np.arange(self.sequences.start, self.sequences.stop, dtype=np.int64)

    @property
    def tokens(self) -> int:
        sizes = self.source.sizes[self.sequences.start : self.sequences.stop]
        return int(sizes.sum(dtype=np.int64))


class SplitBuilder:
    """Opens every prefix once and builds the datasets of all splits.

    open_source: reader of one prefix. vocab_size: ids from there on are refused; needed with
    mock data. eod: end-of-document id, see :func:`end_of_document`. cache_path: folder of the
    index caches; None is ``{prefix}.cache`` beside each dataset.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        sequence_length: int,
        counts: SampleCounts,
        seed: int,
        open_source: SourceOpener,
        vocab_size: int | None = None,
        eod: int | None = None,
        cache_path: Path | None = None,
        notify: Notify = ignore,
    ) -> None:
        self._config = config
        self._length = sequence_length
        self._counts = counts
        self._seed = seed
        self._open_source = open_source
        self._vocab_size = vocab_size
        self._eod = end_of_document(config, eod, vocab_size)
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

    def _part(self, prefix: str, split: SplitName, shares: str) -> _Part | None:
        if prefix not in self._opened:
            self._opened[prefix] = self._open_source(Path(prefix))
        source = self._opened[prefix]
        sequences = split_ranges(shares, len(source))[SPLITS.index(split)]
        if sequences is None:
            return None
        if not len(source):
            raise DataError(f"{prefix}: the dataset is empty. Preprocess some text.")
        require_sequences(sequences, split, shares, len(source), prefix)
        folder = self._cache_path or Path(f"{prefix}.cache")
        part = _Part(prefix, source, sequences, IndexCache(folder, notify=self._notify))
        self._require_sample(part, split, shares)
        return part

    def _mock_part(self, split: SplitName) -> _Part:
        if self._vocab_size is None:
            rule = "must be given with --mock-data"
            raise ConfigError([Problem("model.vocab_size", None, rule)])
        if MOCK not in self._opened:
            assert self._eod is not None
            self._opened[MOCK] = MockSource(self._vocab_size, self._eod)
        source = self._opened[MOCK]
        sequences = split_ranges(MOCK_SPLIT, len(source))[SPLITS.index(split)]
        return _Part(MOCK, source, sequences or range(0), None)

    def _require_sample(self, part: _Part, split: SplitName, shares: str) -> None:
        if part.tokens > self._length:
            return
        whole = self._config.data_path and len(part.sequences) < len(part.source)
        share = f", raise its share in --split {shares}" if whole else ""
        raise DataError(
            f"{part.name}: the {split} split has {len(part.sequences)} of {len(part.source)} "
            f"sequences with {part.tokens} tokens, fewer than one sample of {self._length} + 1. "
            f"Lower --seq-length{share}, or use more data."
        )

    def _single(self, part: _Part, split: SplitName, needed: int) -> GPTDataset:
        one_epoch = (part.tokens - 1) // self._length
        if split == "train" or one_epoch >= needed:
            return self._gpt(part, needed)
        self._notify(
            f"{part.name}: the {split} split has {one_epoch} samples, fewer than the {needed} "
            f"asked for; each of them is evaluated once"
        )
        return self._gpt(part, None)

    def _blended(self, parts: Sequence[_Part], blend: Blend, needed: int) -> BlendedDataset:
        cache = parts[0].cache
        lengths = np.array([(part.tokens - 1) // self._length for part in parts], dtype=np.int64)
        if blend.weights is not None:
            targets = target_sizes(blend.normalized, needed)
            indices = blend_index(blend.normalized, sum(targets), cache)
            sizes: list[int] | list[None] = with_surplus(targets)
        else:
            indices = blend_index(lengths, self._unweighted_size(lengths, needed), cache)
            sizes = [None] * len(parts)
        if self._config.data_order == "epochs":
            # What is drawn is known, and an order by epochs does not change with it.
            sizes = [max(1, count) for count in indices.counts(len(parts)).tolist()]
        datasets = [self._gpt(part, size) for part, size in zip(parts, sizes, strict=True)]
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

    def _gpt(self, part: _Part, num_samples: int | None) -> GPTDataset:
        return GPTDataset(
            part.source,
            part.documents,
            self._length,
            num_samples,
            self._seed,
            self._config.data_order,
            self._eod,
            self._config.eod_mask_loss,
            part.cache,
            vocab_size=self._vocab_size,
            name=part.name,
        )


def end_of_document(config: DataConfig, eod: int | None, vocab_size: int | None) -> int | None:
    """The id that ends documents: ``eod``, that of the tokenizer; of mock data the last one.

    Raises ConfigError, once for each option that cannot do without it.
    """
    if eod is None and config.mock_data and vocab_size is not None:
        return vocab_size - 1
    if eod is None and not config.mock_data:
        needing = [name for name in NEED_EOD if getattr(config, name)]
        rule = "needs the end-of-document id, which the dataset's tokenizer does not name"
        fix = "Use what mtk preprocess wrote, with a tokenizer that has one, or leave it out."
        if needing:
            raise ConfigError([Problem(f"data.{name}", True, rule, fix) for name in needing])
    return eod


def build_splits(
    config: DataConfig,
    *,
    sequence_length: int,
    counts: SampleCounts,
    seed: int,
    open_source: SourceOpener,
    vocab_size: int | None = None,
    eod: int | None = None,
    cache_path: Path | None = None,
    notify: Notify = ignore,
) -> Splits:
    """The datasets of a run; arguments as of :class:`SplitBuilder`."""
    builder = SplitBuilder(
        config,
        sequence_length=sequence_length,
        counts=counts,
        seed=seed,
        open_source=open_source,
        vocab_size=vocab_size,
        eod=eod,
        cache_path=cache_path or (Path(config.data_cache_path) if config.data_cache_path else None),
        notify=notify,
    )
    return builder.build()
