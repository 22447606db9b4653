"""Samples of one dataset as a training would make them, to be looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mtk.config.pretrain import DataConfig
from mtk.data.dataset_artifact import DatasetInfo, open_dataset
from mtk.data.gpt_indices import Order
from mtk.data.gpt_samples import GPTSamples
from mtk.data.ict_dataset import IctRules
from mtk.data.ict_samples import IctSamples
from mtk.data.sample_kind import Part, SampleKind
from mtk.data.sentence_dataset import SentenceRules
from mtk.data.sentence_samples import SentenceSamples
from mtk.data.token_source import SampleDataset
from mtk.data.word_vocabulary import word_vocabulary
from mtk.errors import ConfigError, DataError, Problem
from mtk.tokenizers import load_tokenizer

Family = Literal["gpt", "bert", "t5", "ict"]


@dataclass(frozen=True)
class SampleOptions:
    """How samples are made. length: tokens of a sample; decoder_length: of T5's decoder.
    titles: prefix of a dataset with the titles of the documents, for ICT; query_in_block_prob,
    one_sentence: see :class:`~mtk.data.ict_dataset.IctRules`."""

    family: Family = "gpt"
    length: int = 1024
    decoder_length: int = 128
    seed: int = 1234
    order: Order = "epochs"
    titles: str | None = None
    query_in_block_prob: float = 0.1
    one_sentence: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.titles is not None and self.family != "ict":
            problems.append(Problem("titles", self.titles, "belongs to --family ict"))
        if not 0 <= self.query_in_block_prob <= 1:
            nearest = f"Nearest: {min(max(self.query_in_block_prob, 0.0), 1.0)}."
            problems.append(
                Problem(
                    "query_in_block_prob", self.query_in_block_prob, "must lie in 0..1", nearest
                )
            )
        for name, value, least in (
            ("seq_length", self.length, 1),
            ("decoder_seq_length", self.decoder_length, 1),
            ("seed", self.seed, 0),
        ):
            if value < least:
                rule = f"must be at least {least}"
                problems.append(Problem(name, value, rule, f"Nearest: {least}."))
        if problems:
            raise ConfigError(problems)


def samples_of(info: DatasetInfo, options: SampleOptions, count: int) -> SampleDataset:
    """At least ``count`` samples of all documents of a dataset, as ``--split 1,0,0`` makes them.

    Nothing is written to a cache. Raises ConfigError and DataError.
    """
    source, kind = info.open(), _kind(info, options)
    part = Part(str(info.prefix), source, range(kind.count(source)), None)
    kind.require_sample(part, "train", "")
    return kind.dataset(part, count)


def _kind(info: DatasetInfo, options: SampleOptions) -> SampleKind:
    config = DataConfig(data_path=(str(info.prefix),), data_order=options.order)
    if options.family == "gpt":
        return GPTSamples(config, options.length, options.seed, info.vocab_size, info.eod)
    if info.tokenizer_folder is None:
        raise DataError(
            f"{info.prefix} has no manifest that names its tokenizer, which samples of "
            f"{options.family} need for their special tokens. Use what mtk preprocess wrote."
        )
    tokenizer = load_tokenizer(info.tokenizer_folder)
    vocabulary, name = word_vocabulary(tokenizer), f"the data's {tokenizer.kind}"
    if options.family == "ict":
        ict = IctRules(options.length, options.query_in_block_prob, options.one_sentence)
        titles = {}
        if options.titles is not None:
            titles[str(info.prefix)] = open_dataset(options.titles).open()
        return IctSamples(config, ict, options.seed, vocabulary, titles, name)
    rules = SentenceRules(options.length, options.decoder_length)
    return SentenceSamples(config, options.family, rules, options.seed, vocabulary, name)
