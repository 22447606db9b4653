"""Blocks and queries of the inverse cloze task: golden values, the plain rule, the samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mtk.config.pretrain import DataConfig
from mtk.data.build import SampleCounts, build_splits
from mtk.data.gpt_indices import Order
from mtk.data.ict_dataset import IctDataset, IctRules
from mtk.data.ict_indices import BlockRules, block_documents, build_blocks
from mtk.data.ict_samples import IctSamples
from mtk.data.index_cache import IndexCache
from mtk.data.sentence_dataset import Sentences
from mtk.data.word_vocabulary import WordVocabulary
from mtk.errors import ConfigError, DataError
from tests.datasets.sources import MemorySource

LENGTHS = [10, 12, 8, 20, 5, 7, 9, 11, 30, 6, 6, 6, 15, 4, 3, 2]
STARTS = [0, 4, 5, 9, 12, 16]
TITLES = [2, 3, 1, 2, 4]
CLS, SEP = 998, 999
VOCABULARY = WordVocabulary(
    1000, np.arange(1000), np.zeros(1000, dtype=bool), pad=0, cls=CLS, sep=SEP
)
TWO = [[9, 12, 3, 2], [0, 4, 0, 0], [5, 9, 2, 1], [12, 16, 4, 3]]
ONE = [[12, 16, 4, 5], [3, 4, 0, 1], [0, 3, 0, 0], [4, 5, 1, 2], [9, 12, 3, 4], [5, 9, 2, 3]]


class Text(MemorySource):
    """Sentences in documents; token ``t`` of sentence ``s`` is ``1 + 40 * s + t``."""

    def __init__(self, lengths: list[int], starts: list[int], first: int = 1) -> None:
        super().__init__([first + 40 * s + np.arange(n) for s, n in enumerate(lengths)])
        self.document_indices = np.array(starts, dtype=np.int64)


def titles() -> Text:
    """Titles of 2, 3, 1, 2, 4 tokens from 700 on."""
    return Text(TITLES, list(range(6)), 700)


def dataset(
    documents: range = range(5), rules: IctRules | None = None, named: bool = True, **more: object
) -> IctDataset:
    sentences = Sentences(Text(LENGTHS, STARTS), documents, VOCABULARY, "d")
    source = titles() if named else None
    return IctDataset(sentences, source, rules or IctRules(35), None, 1234, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["megatron", "epochs"])
@pytest.mark.parametrize(("one", "wanted"), [(False, TWO), (True, ONE)])
def test_golden_blocks(order: Order, one: bool, wanted: list[list[int]]) -> None:
    rules = BlockRules(32, one)
    sizes = np.array(LENGTHS, dtype=np.int32)
    corpus = block_documents(sizes, np.array(STARTS), np.array(TITLES), rules)
    found = build_blocks(corpus, rules, 1234, None, order, len(sizes))
    assert found.tolist() == wanted and found.dtype == np.uint32


def plain(lengths: list[int], starts: list[int], titles: list[int], rules: BlockRules) -> list:
    """The rule sentence by sentence, without the order."""
    found: list[tuple[int, int, int, int]] = []
    for document in range(len(starts) - 1):
        first, last = starts[document], starts[document + 1]
        if last - first < rules.least or max(lengths[first:last], default=0) > 512:
            continue
        begin, tokens = first, 0
        for at in range(first, last):
            tokens += lengths[at]
            left, count = last - at - 1, at + 1 - begin
            full = tokens >= rules.longest - titles[document]
            if (full and left >= rules.least and count >= rules.least) or not left:
                found.append((begin, at + 1, document, len(found)))
                begin, tokens = at + 1, 0
    return found


def test_equals_the_plain_rule() -> None:
    rng = np.random.default_rng(5)
    left_out = 0
    for _ in range(200):
        counts = rng.integers(0, 9, size=int(rng.integers(1, 12)))
        starts = np.concatenate(([0], np.cumsum(counts)))
        lengths = rng.integers(0, 60, size=int(starts[-1])).astype(np.int32)
        lengths[rng.random(len(lengths)) < 0.03] = 513
        own = rng.integers(0, 50, size=len(counts))
        rules = BlockRules(int(rng.integers(2, 120)), bool(rng.random() < 0.5))
        wanted = plain(lengths.tolist(), starts.tolist(), own.tolist(), rules)
        corpus = block_documents(lengths, starts, own, rules)
        left_out += corpus.long
        if not wanted:
            assert not len(corpus.begins)
            continue
        found = build_blocks(corpus, rules, 3, 2 * len(wanted) + 1, "epochs", len(lengths))
        assert len(found) == 3 * len(wanted)  # whole epochs
        for epoch in range(3):
            rows = found[epoch * len(wanted) : (epoch + 1) * len(wanted)]
            assert sorted(map(tuple, rows.tolist())) == sorted(wanted)
    assert left_out > 20


def test_a_longer_training_begins_alike_and_epochs_differ() -> None:
    sizes = np.full(80, 20, dtype=np.int32)
    rules = BlockRules(30, True)
    corpus = block_documents(sizes, np.arange(0, 81, 4), np.zeros(20, dtype=int), rules)
    short, long = (build_blocks(corpus, rules, 1, n, "epochs", 80).tolist() for n in (1, 100))
    assert long[: len(short)] == short and long[len(short) : 2 * len(short)] != short


def test_samples() -> None:
    data = dataset(rules=IctRules(35, query_in_block_prob=0.5))
    kept = 0
    for k in range(len(data)):
        begin, end, document, _ = data.block_of(k)
        sample = data[k]
        query = sample["query_tokens"][sample["query_pad_mask"] == 1].tolist()
        context = sample["context_tokens"][sample["context_pad_mask"] == 1].tolist()
        sentences = [(1 + 40 * s + np.arange(LENGTHS[s])).tolist() for s in range(begin, end)]
        assert query[0] == CLS and query[-1] == SEP and query[1:-1] in sentences
        title = (700 + 40 * document + np.arange(TITLES[document])).tolist()
        assert context[: len(title) + 2] == [CLS, *title, SEP] and context[-1] == SEP
        room = 35 - 3 - len(title)
        rest = [s for s in sentences if s != query[1:-1]]
        inside = context[len(title) + 2 : -1]
        whole, without = ([i for s in text for i in s][:room] for text in (sentences, rest))
        assert inside in (whole, without)
        kept += inside == whole
        assert sample["block_data"].tolist() == list(data.block_of(k))
        for name in ("query", "context"):
            there = sample[f"{name}_pad_mask"]
            assert np.array_equal(sample[f"{name}_mask"], np.outer(there, there) == 1)
            assert len(there) == 35 and sample[f"{name}_tokens"][there == 0].sum() == 0
    assert 0 < kept < len(data)


@pytest.mark.parametrize(("share", "kept"), [(0.0, 0), (1.0, 4)])
def test_how_often_the_sentence_stays(share: float, kept: int) -> None:
    data = dataset(rules=IctRules(200, share))
    inside = 0
    for k in range(len(data)):
        begin, end, document, _ = data.block_of(k)
        count = int(data[k]["context_pad_mask"].sum())
        inside += count == 3 + TITLES[document] + sum(LENGTHS[begin:end])
    assert inside == kept * len(data) // 4


def test_a_sample_depends_on_its_number_alone() -> None:
    first, second = dataset(), dataset()
    forth = [first[k]["query_tokens"].tolist() for k in range(4)]
    back = [second[k]["query_tokens"].tolist() for k in reversed(range(4))]
    assert forth == back[::-1]


def test_titles_of_a_later_split_are_those_of_its_documents() -> None:
    data = dataset(range(2, 5))
    assert {data.block_of(k)[2] for k in range(len(data))} == {2, 3, 4}
    for k in range(len(data)):
        begin, _, document, _ = data.block_of(k)
        assert begin == STARTS[document]
        assert data[k]["context_tokens"][1] == 700 + 40 * document


def test_without_titles_and_with_too_long_ones() -> None:
    sample = dataset(named=False)[0]
    assert sample["context_tokens"][0] == CLS and sample["context_tokens"][1] < 700
    assert (sample["context_tokens"] == SEP).sum() == 1
    tight = dataset(rules=IctRules(6))
    for k in range(len(tight)):
        assert tight[k]["context_tokens"].shape == (6,)
        assert (tight[k]["context_tokens"] == SEP).sum() == 2


def test_what_does_not_fit_is_refused() -> None:
    sentences = Sentences(Text(LENGTHS, STARTS), range(5), VOCABULARY, "d")
    with pytest.raises(DataError, match="d has 5 documents, but there are 2 titles"):
        IctDataset(sentences, Text([1, 1], [0, 1, 2]), IctRules(35), None, 1)
    with pytest.raises(DataError, match="1 of 1 documents have fewer than 2 sentences"):
        dataset(range(1, 2))
    assert len(dataset(range(1, 2), IctRules(35, one_sentence=True))) == 1
    told: list[str] = []
    dataset(notify=told.append)
    assert told == ["d: 1 of 5 documents have fewer than 2 sentences, 0 have a sentence of more "
                    "than 512 tokens: they are left out"]  # fmt: skip
    lacking = WordVocabulary(10, np.arange(10), np.zeros(10, dtype=bool))
    with pytest.raises(ConfigError, match=r"needs \[CLS\] and \[SEP\]"):
        IctSamples(DataConfig(data_path=("d",)), IctRules(35), 1, lacking, {})


def test_through_the_builder_and_a_cache(tmp_path: Path) -> None:
    config = DataConfig(data_path=("d",), split="3,2,0")
    kind = IctSamples(config, IctRules(35), 1234, VOCABULARY, {"d": titles()})
    opened = {"d": Text(LENGTHS, STARTS)}
    splits = build_splits(
        config,
        kind,
        SampleCounts(train=5, valid=1),
        lambda path: opened[str(path)],
        cache_path=tmp_path,
    )
    assert splits.train is not None and splits.valid is not None
    documents = [
        {int(s[k]["block_data"][2]) for k in range(len(s))} for s in (splits.train, splits.valid)
    ]
    assert documents == [{0, 2}, {3, 4}]
    cached = dataset(cache=IndexCache(tmp_path / "c"))
    again = dataset(cache=IndexCache(tmp_path / "c"))
    blocks = [[d.block_of(k) for k in range(len(d))] for d in (cached, again, dataset())]
    assert blocks[0] == blocks[1] == blocks[2] == [tuple(row) for row in TWO]
