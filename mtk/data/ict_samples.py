"""Queries and blocks of the inverse cloze task: documents are divided into splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mtk.config.pretrain import DataConfig
from mtk.data.ict_dataset import IctDataset, IctRules
from mtk.data.sample_kind import Part
from mtk.data.sentence_dataset import Sentences
from mtk.data.splits import SplitName
from mtk.data.token_source import Notify, TokenSource, ignore
from mtk.data.word_vocabulary import WordVocabulary
from mtk.errors import ConfigError, Problem


@dataclass(frozen=True)
class IctSamples:
    """Implements :class:`~mtk.data.sample_kind.SampleKind`.

    titles: of each dataset of sentences, by its prefix; blocks of others have none. vocabulary:
    of their tokenizer, called ``tokenizer`` in messages. Raises ConfigError if it lacks CLS or
    SEP, or if a sample is too short for anything but special ids.
    """

    config: DataConfig
    rules: IctRules
    seed: int
    vocabulary: WordVocabulary
    titles: Mapping[str, TokenSource]
    tokenizer: str = "the tokenizer"
    notify: Notify = ignore

    def __post_init__(self) -> None:
        if self.vocabulary.cls is None or self.vocabulary.sep is None:
            rule = f"needs [CLS] and [SEP], which {self.tokenizer} lacks"
            fix = "Preprocess with BertWordPieceLowerCase or BertWordPieceCase."
            raise ConfigError([Problem("model.family", "ict", rule, fix)])
        if self.rules.length < 5:
            rule = "must be at least 5: three special tokens and 2 of text"
            problem = Problem("model.seq_length", self.rules.length, rule, "Nearest: 5.")
            raise ConfigError([problem])

    @property
    def unit(self) -> str:
        return "documents"

    def count(self, source: TokenSource) -> int:
        return len(source.document_indices) - 1

    def mock(self) -> TokenSource:
        rule = "makes no text with titles"
        raise ConfigError([Problem("data.mock_data", True, rule, "Give --data-path.")])

    def require_sample(self, part: Part, split: SplitName, raise_share: str) -> None:
        """The dataset itself says so when it is made."""
        del part, split, raise_share

    def one_epoch(self, part: Part) -> int:
        return len(self.dataset(part, None))

    def dataset(self, part: Part, num_samples: int | None) -> IctDataset:
        return IctDataset(
            Sentences(part.source, part.units, self.vocabulary, part.name),
            self.titles.get(part.name),
            self.rules,
            num_samples,
            self.seed,
            self.config.data_order,
            part.cache,
            self.notify,
        )
