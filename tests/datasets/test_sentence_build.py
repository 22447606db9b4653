"""From data options to BERT's and T5's datasets: splits by documents, blends, mock, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from mtk.config.pretrain import DataConfig
from mtk.data.blend import BlendedDataset
from mtk.data.build import SampleCounts, Splits, build_splits
from mtk.data.mock_sentences import MockSentences, mock_vocabulary
from mtk.data.sentence_dataset import SentenceRules
from mtk.data.sentence_samples import SentenceSamples
from mtk.data.token_source import SampleDataset, TokenSource, ignore
from mtk.data.word_vocabulary import WordVocabulary, word_vocabulary
from mtk.errors import ConfigError, DataError, MtkError
from mtk.tokenizers.library import BertWordPieceLowerCase
from mtk.tokenizers.null import NullTokenizer
from tests.datasets.masked import FIRST_WORD, SentenceSource, random_source, vocabulary
from tests.datasets.sources import unique_source

Family = Literal["bert", "t5"]
FAMILIES: tuple[Family, ...] = ("bert", "t5")
SOURCES: dict[str, TokenSource] = {
    "a": random_source(np.random.default_rng(0), 500),
    "b": random_source(np.random.default_rng(1), 200),
    "few": random_source(np.random.default_rng(2), 10),
    "a_document": unique_source([20] * 50),
    "short_sentence": SentenceSource([[np.full(9, FIRST_WORD)]] * 50),
    "empty": SentenceSource([]),
}


def build(
    folder: Path,
    family: Family,
    counts: tuple[int, int, int] = (300, 20, 0),
    *,
    known: WordVocabulary | None = None,
    rules: SentenceRules | None = None,
    **options: Any,
) -> Splits:
    notify = options.pop("notify", ignore)
    if path := options.get("data_path"):
        options["data_path"] = tuple(str(folder / i) if i in SOURCES else i for i in path.split())
    config = DataConfig(**options)
    samples = SentenceSamples(
        config,
        family,
        rules or SentenceRules(64, 48),
        1234,
        vocabulary() if known is None else known,
        "its tokenizer",
        notify,
    )
    return build_splits(
        config, samples, SampleCounts(*counts), lambda p: SOURCES[p.name], notify=notify
    )


def present(dataset: SampleDataset | None) -> SampleDataset:
    assert dataset is not None
    return dataset


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_divide_documents(tmp_path: Path, family: Family) -> None:
    splits = build(tmp_path, family, (400, 9, 2), data_path="a", split="400,90,10")
    starts = SOURCES["a"].document_indices
    for split, (first, last) in (("train", (0, 400)), ("valid", (400, 490)), ("test", (490, 500))):
        data = present(getattr(splits, split))
        found = {p.sequence for k in range(len(data)) for p in data.documents_of(k)}
        assert found <= set(range(int(starts[first]), int(starts[last])))
        assert len(found) > (last - first)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", ["a", "a b", "3 a 1 b"])
def test_the_beginning_does_not_depend_on_the_length(
    tmp_path: Path, family: Family, path: str
) -> None:
    short, long = (
        present(build(tmp_path, family, (count, 20, 0), data_path=path).train)
        for count in (150, 6000)
    )
    assert len(long) >= 6000
    assert all(same(short[k], long[k]) for k in range(150))


def test_blends_and_their_shares(tmp_path: Path) -> None:
    train = present(build(tmp_path, "bert", (400, 0, 0), data_path="3 a 1 b").train)
    assert isinstance(train, BlendedDataset)
    names = [Path(train.source_of(k)).name for k in range(400)]
    assert (names.count("a"), names.count("b")) == (300, 100)
    assert train[0].keys() >= {"tokens", "types", "order", "dataset_id"}


def test_one_epoch_is_drawn_once(tmp_path: Path) -> None:
    told: list[str] = []
    build(tmp_path, "bert", (10, 20, 0), data_path="a", notify=told.append)
    longer: list[str] = []
    build(tmp_path, "bert", (50, 10, 0), data_path="a", notify=longer.append)
    assert len([m for m in told if "built sentences index" in m]) == 2  # of the two splits
    assert longer == []


def test_small_held_out_splits_are_taken_once(tmp_path: Path) -> None:
    told: list[str] = []
    splits = build(tmp_path, "bert", (10, 900, 0), data_path="a", notify=told.append)
    count = len(present(splits.valid))
    assert any(f"has {count} samples, fewer than the 900 asked for" in m for m in told)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [16, 50, 1000, 30522])
def test_mock_data(tmp_path: Path, family: Family, size: int) -> None:
    known = mock_vocabulary(size)
    rules = SentenceRules(32, 24)
    splits = build(tmp_path, family, (40, 5, 5), known=known, rules=rules, mock_data=True)
    again = build(tmp_path, family, (900, 5, 5), known=known, rules=rules, mock_data=True)
    for k in range(40):
        sample = present(splits.train)[k]
        assert same(sample, present(again.train)[k])
        assert all(int(ids.min()) >= 0 and int(ids.max()) < size for ids in (sample["tokens"],))
    assert list(tmp_path.iterdir()) == []


def test_mock_sentences_count_on() -> None:
    source = MockSentences(mock_vocabulary(1000))
    first, last = source.document_indices[7:9].tolist()
    text = np.concatenate([source.get(i) for i in range(first, last)])
    assert len(source) == len(source.sizes) == source.document_indices[-1]
    assert set(np.diff(text).tolist()) <= {1, 1 - min(mock_vocabulary(1000).sentinels) + 1}
    assert source.get(first, 2, 3).tolist() == text[2:5].tolist()
    with pytest.raises(ConfigError, match="must be at least 16"):
        mock_vocabulary(15)


LINES = [*("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), *("#", "##ing", "##ed", "walk")]
WORDPIECE = {"vocab.txt": "".join(f"{line}\n" for line in LINES).encode()}


def wordpiece(bert_eod: str, extra_ids: int) -> WordVocabulary:
    options = {"bert_eod": bert_eod, "extra_ids": extra_ids}
    return word_vocabulary(BertWordPieceLowerCase(options, WORDPIECE))


def test_the_vocabulary_of_a_tokenizer() -> None:
    found = wordpiece("eos", 3)
    assert (found.pad, found.cls, found.sep, found.mask) == (0, 2, 3, 4)
    assert (found.bos, found.eos, found.sentinels) == (9, 10, (11, 12, 13))
    assert found.size == 14 and found.ids.tolist() == list(range(14))
    assert np.flatnonzero(found.continues).tolist() == [6, 7]
    bare = word_vocabulary(NullTokenizer({"vocab_size": 20, "eod": None}))
    assert (bare.pad, bare.cls, bare.bos, bare.sentinels) == (0, None, None, ())
    assert not bare.continues.any()


A = {"data_path": "a"}
REFUSED: dict[str, tuple[Family, dict[str, Any], type[MtkError], str]] = {
    "one sequence a document": (
        "t5",
        {"data_path": "a_document", "split": "1,1,1"},
        DataError,
        "a_document: every document is one sequence, .*--split-sentences",
    ),
    "one sentence a document": (
        "bert",
        {"data_path": "short_sentence", "split": "1,1,1"},
        DataError,
        r"(17|16) of (17|16) documents have fewer than 2 sentences.*--bert-no-binary-head",
    ),
    "no document": ("t5", {"data_path": "empty"}, DataError, "the dataset is empty"),
    "empty split": (
        "t5",
        {"data_path": "few"},
        DataError,
        "valid split of --split 969,30,1 is empty: its share of 10 documents .* one document",
    ),
    "no mask": (
        "bert",
        {**A, "known": vocabulary(mask=None, cls=None)},
        ConfigError,
        "needs cls, mask in the vocabulary, which its tokenizer has not.*BertWordPieceLowerCase",
    ),
    "no sentinels": (
        "t5",
        {**A, "known": wordpiece("eos", 0)},
        ConfigError,
        "needs sentinels .*--vocab-extra-ids 100 and BertWordPieceLowerCase.*SentencePiece",
    ),
    "no eos": ("t5", {**A, "known": wordpiece("sep", 9)}, ConfigError, "needs eos"),
    "too few sentinels": (
        "t5",
        {**A, "rules": SentenceRules(512), "known": vocabulary(sentinels=(6, 7))},
        ConfigError,
        "model.seq_length = 512: masks more spans than the 2 sentinels .*--vocab-extra-ids 38",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_refusals(tmp_path: Path, case: tuple[Family, dict[str, Any], type[MtkError], str]) -> None:
    family, options, kind, message = case
    with pytest.raises(kind, match=message):
        build(tmp_path, family, (50, 5, 0), **options)
    # Another split's index may be there, but nothing half-written.
    assert [p for p in tmp_path.rglob(".*") if p.suffix != ".lock"] == []


def test_documents_of_one_sentence_are_enough_without_pairs(tmp_path: Path) -> None:
    rules = SentenceRules(64, 48, pairs=False)
    for family in FAMILIES:
        splits = build(tmp_path, family, data_path="short_sentence", split="1,1,1", rules=rules)
        assert len(present(splits.train)) >= 300
