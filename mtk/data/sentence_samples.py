"""Samples of BERT and T5: documents are divided into splits, and must consist of sentences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mtk.config.pretrain import DataConfig
from mtk.data.bert_dataset import BertDataset
from mtk.data.mock_sentences import MockSentences
from mtk.data.sample_kind import Part
from mtk.data.sentence_dataset import SentenceDataset, SentenceRules, Sentences
from mtk.data.splits import SplitName
from mtk.data.t5_dataset import T5Dataset, spans_expected
from mtk.data.token_source import Notify, TokenSource, ignore
from mtk.data.word_vocabulary import WordVocabulary, require_special_ids
from mtk.errors import ConfigError, DataError, Problem

DATASETS: dict[str, type[SentenceDataset]] = {"bert": BertDataset, "t5": T5Dataset}
SENTENCE_LEVEL = "_sentence"  # how the names of sentence-level datasets end


@dataclass(frozen=True)
class SentenceSamples:
    """Implements :class:`~mtk.data.sample_kind.SampleKind`.

    vocabulary: of the datasets' tokenizer, or of mock data; tokenizer: its name, in messages.
    Raises ConfigError if it lacks special ids that the family's samples are made with.
    """

    config: DataConfig
    family: Literal["bert", "t5"]
    rules: SentenceRules
    seed: int
    vocabulary: WordVocabulary
    tokenizer: str = "the tokenizer"
    notify: Notify = ignore
    _epochs: dict[tuple[str, range], SentenceDataset] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        require_special_ids(self.vocabulary, self.family, self.tokenizer)
        have = len(self.vocabulary.sentinels)
        wanted = spans_expected(self.rules.mask_prob, self.rules.length)
        if self.family == "t5" and have < wanted:
            rule = f"masks more spans than the {have} sentinels of {self.tokenizer} can stand for"
            fix = f"Preprocess with --vocab-extra-ids {wanted} or more, or lower --mask-prob."
            raise ConfigError([Problem("model.seq_length", self.rules.length, rule, fix)])

    @property
    def unit(self) -> str:
        return "documents"

    def count(self, source: TokenSource) -> int:
        return len(source.document_indices) - 1

    def mock(self) -> TokenSource:
        return MockSentences(self.vocabulary)

    def require_sample(self, part: Part, split: SplitName, raise_share: str) -> None:
        starts = part.source.document_indices
        one_each = int(np.diff(starts).max(initial=0)) <= 1
        if one_each and not part.name.endswith(SENTENCE_LEVEL):
            raise DataError(
                f"{part.name}: every document is one sequence, but {self.family} learns from "
                f"sentences. Preprocess the corpus with --split-sentences."
            )
        del split, raise_share

    def one_epoch(self, part: Part) -> int:
        return len(self.dataset(part, None))

    def dataset(self, part: Part, num_samples: int | None) -> SentenceDataset:
        # One epoch is the same whoever asks for it, and need not be drawn and kept twice.
        key = part.name, part.units
        if key not in self._epochs:
            self._epochs[key] = self._make(part, None, self.notify)
        epoch = self._epochs[key]
        enough = num_samples is None or num_samples <= len(epoch)
        return epoch if enough else self._make(part, num_samples, ignore)

    def _make(self, part: Part, num_samples: int | None, notify: Notify) -> SentenceDataset:
        return DATASETS[self.family](
            Sentences(part.source, part.units, self.vocabulary, part.name),
            self.rules,
            num_samples,
            self.seed,
            self.config.data_order,
            part.cache,
            notify,
        )
