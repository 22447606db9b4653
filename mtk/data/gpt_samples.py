"""Samples of causal language models: windows over sequences, whatever their documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtk.config.pretrain import DataConfig
from mtk.data.gpt_dataset import GPTDataset
from mtk.data.mock import MockSource
from mtk.data.sample_kind import Part
from mtk.data.splits import SplitName
from mtk.data.token_source import TokenSource
from mtk.errors import ConfigError, DataError, Problem

NEED_EOD = ("eod_mask_loss", "reset_attention_mask", "reset_position_ids")


@dataclass(frozen=True)
class GPTSamples:
    """Implements :class:`~mtk.data.sample_kind.SampleKind`.

    length: tokens of a sample. vocab_size: ids from there on are refused; needed with mock
    data. eod: end-of-document id, see :func:`end_of_document`, which may raise ConfigError.
    """

    config: DataConfig
    length: int
    seed: int
    vocab_size: int | None = None
    eod: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "eod", end_of_document(self.config, self.eod, self.vocab_size))

    @property
    def unit(self) -> str:
        return "sequences"

    def count(self, source: TokenSource) -> int:
        return len(source)

    def mock(self) -> TokenSource:
        if self.vocab_size is None or self.eod is None:
            rule = "must be given with --mock-data"
            raise ConfigError([Problem("model.vocab_size", None, rule)])
        return MockSource(self.vocab_size, self.eod)

    def require_sample(self, part: Part, split: SplitName, raise_share: str) -> None:
        tokens = _tokens(part)
        if tokens <= self.length:
            raise DataError(
                f"{part.name}: the {split} split has {len(part.units)} of {len(part.source)} "
                f"sequences with {tokens} tokens, fewer than one sample of {self.length} + 1. "
                f"Lower --seq-length{raise_share}, or use more data."
            )

    def one_epoch(self, part: Part) -> int:
        return (_tokens(part) - 1) // self.length

    def dataset(self, part: Part, num_samples: int | None) -> GPTDataset:
        return GPTDataset(
            part.source,
            np.arange(part.units.start, part.units.stop, dtype=np.int64),
            self.length,
            num_samples,
            self.seed,
            self.config.data_order,
            self.eod,
            self.config.eod_mask_loss,
            part.cache,
            vocab_size=self.vocab_size,
            name=part.name,
        )


def _tokens(part: Part) -> int:
    sizes = part.source.sizes[part.units.start : part.units.stop]
    return int(sizes.sum(dtype=np.int64))


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
