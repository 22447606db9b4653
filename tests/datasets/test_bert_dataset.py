"""BERT's samples: what masking keeps and hides, segments, determinism, bad data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtk.data.bert_dataset import BertDataset, shortened
from mtk.data.index_cache import IndexCache
from mtk.data.masking import mask_budget
from mtk.data.sentence_dataset import SentenceRules, Sentences
from mtk.errors import DataError
from tests.datasets.masked import (
    BERT_GOLDEN,
    BERT_NAMES,
    BERT_RULES,
    CLS,
    FIRST_WORD,
    MASK,
    PAD,
    SEP,
    SIZE,
    SentenceSource,
    fingerprint,
    golden_source,
    random_source,
    vocabulary,
)

SOURCE = random_source(np.random.default_rng(0), 120)
EVERYTHING = range(120)


def dataset(rules: SentenceRules, samples: int | None = None, **options: Any) -> BertDataset:
    source, documents = options.pop("source", SOURCE), options.pop("documents", EVERYTHING)
    names = {"name": options.pop("name", "data")}
    seed = options.pop("seed", 1234)
    sentences = Sentences(source, documents, options.pop("vocabulary", vocabulary()), **names)
    return BertDataset(sentences, rules, samples, seed, **options)


def test_golden_values_of_megatron() -> None:
    data = dataset(BERT_RULES, 6, source=golden_source(), documents=range(3), order="megatron")
    sample = data[2]  # B, which comes first, was cut at its front and its end
    assert sample["tokens"].tolist() == [
        *(CLS, 138, MASK, 148, 153, 158, 139, 144, 149, 154, 159, 164, 169, 174, 179, MASK, SEP),
        *(MASK, MASK, 136, 141, 146, 117, 122, 127, 132, 137, 142, 147, 152, 157, SEP),
    ]
    masked = {2: 143, 15: 184, 17: 126, 18: 131}
    assert {int(i): int(sample["labels"][i]) for i in np.flatnonzero(sample["loss_mask"])} == masked
    assert sample["types"].tolist() == [0] * 17 + [1] * 15
    assert int(sample["order"]) == 1
    assert fingerprint((data[k] for k in range(len(data))), BERT_NAMES) == BERT_GOLDEN


def original(sample: dict[str, Any]) -> np.ndarray:
    masked = sample["loss_mask"] == 1
    text = np.where(masked, sample["labels"], sample["tokens"])
    return text[sample["documents"] == 0]


@pytest.mark.parametrize("pairs", [True, False])
def test_labels_give_back_the_text(pairs: bool) -> None:
    data = dataset(SentenceRules(128, pairs=pairs), 400)
    swapped = 0
    for k in range(len(data)):
        sample, text = data[k], original(data[k])
        assert {name: array.shape for name, array in sample.items()} == {
            **dict.fromkeys(("tokens", "types", "labels", "loss_mask", "documents"), (128,)),
            **({"order": ()} if pairs else {}),
        }
        assert text[0] == CLS and text[-1] == SEP
        assert (sample["tokens"][len(text) :] == PAD).all()
        assert (sample["documents"] == (np.arange(128) >= len(text))).all()
        whole = np.concatenate(data.sentences_of(k))
        separators = np.flatnonzero(text == SEP).tolist()
        first, second = text[1 : separators[0]], text[separators[0] + 1 : -1]
        assert sample["types"].tolist() == [
            *([0] * (len(first) + 2)),
            *([1] * (len(text) - len(first) - 2)),
            *([0] * (128 - len(text))),
        ]
        if not pairs:
            assert len(separators) == 1
        if len(whole) > data.target_of(k):
            assert len(first) + len(second) == data.target_of(k)
            continue
        if pairs and int(sample["order"]):
            swapped += 1
            first, second = second, first
        assert np.array_equal(np.concatenate([first, second]), whole)
    assert not pairs or 50 < swapped < len(data) - 50


def test_what_is_masked() -> None:
    data = dataset(SentenceRules(256), 600)
    kinds = {"mask": 0, "same": 0, "other": 0}
    unmasked = 0
    for k in range(600):
        sample, text = data[k], original(data[k])
        masked = np.flatnonzero(sample["loss_mask"])
        budget = mask_budget(0.15, len(text), data.target_of(k))
        assert len(masked) <= budget
        unmasked += not len(masked)
        assert not np.isin(text[masked], (CLS, SEP)).any()
        assert (sample["labels"][sample["loss_mask"] == 0] == 0).all()
        for position in masked.tolist():
            token = int(sample["tokens"][position])
            same = "same" if token == text[position] else "other"
            kinds["mask" if token == MASK else same] += 1
        # Whole words: neighbours that are one word are masked together.
        goes_on = vocabulary().continues[text]
        for i in range(2, len(text)):
            inside = goes_on[i] and text[i - 1] not in (CLS, SEP)
            if inside:
                assert sample["loss_mask"][i] == sample["loss_mask"][i - 1]
    total = sum(kinds.values())
    assert total > 5000
    assert unmasked < 10  # where no word is as short as the budget
    for kind, share in (("mask", 0.8), ("same", 0.1), ("other", 0.1)):
        assert kinds[kind] / total == pytest.approx(share, abs=0.02)


def test_a_sample_depends_on_its_index_only() -> None:
    rules = SentenceRules(64)
    one, other = dataset(rules, 200), dataset(rules, 900)
    backwards = {k: other[k] for k in reversed(range(200))}
    for k in range(200):
        for name, array in one[k].items():
            assert np.array_equal(array, backwards[k][name])
    again = dataset(rules, 200, seed=1235)
    assert any(not np.array_equal(one[k]["tokens"], again[k]["tokens"]) for k in range(200))


def test_an_epoch_is_masked_anew() -> None:
    source = SentenceSource([[np.arange(FIRST_WORD, FIRST_WORD + 30)] * 2])
    data = dataset(SentenceRules(80), 6, source=source, documents=range(1))
    masks = {tuple(data[k]["loss_mask"].tolist()) for k in range(6)}
    assert len(data) == 6
    assert len(masks) > 1


@pytest.mark.parametrize(("left", "right", "target"), [(9, 4, 5), (3, 3, 2), (0, 8, 3), (5, 5, 99)])
def test_the_longer_segment_is_shortened(left: int, right: int, target: int) -> None:
    def slowly(state: np.random.RandomState) -> tuple[list[int], list[int]]:
        first, second = list(range(left)), list(range(100, 100 + right))
        while len(first) + len(second) > target:
            longer = first if len(first) > len(second) else second
            longer.pop(0 if state.random() < 0.5 else -1)
        return first, second

    for seed in range(20):
        found = shortened(
            np.arange(left), np.arange(100, 100 + right), target, np.random.RandomState(seed)
        )
        assert tuple(part.tolist() for part in found) == slowly(np.random.RandomState(seed))


def test_the_index_is_kept_and_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    told: list[str] = []
    cache = IndexCache(tmp_path, notify=told.append)
    one, other = (
        dataset(SentenceRules(64), 300, cache=cache, notify=told.append) for _ in range(2)
    )
    assert len([m for m in told if "built sentences index" in m]) == 1
    assert np.array_equal(one[250]["tokens"], other[250]["tokens"])
    dataset(SentenceRules(65), 300, cache=cache)
    dataset(SentenceRules(64, short_seq_prob=0.2), 300, cache=cache)
    dataset(SentenceRules(64, mask_prob=0.3), 300, cache=cache)  # nothing of the mapping
    assert len([m for m in told if "built sentences index" in m]) == 3


def sentence(size: int) -> np.ndarray:
    return np.full(size, FIRST_WORD + 1)


def test_documents_left_out_are_told() -> None:
    told: list[str] = []
    good = [sentence(5), sentence(6)]
    source = SentenceSource([[sentence(9)], good, [sentence(5), sentence(513)], []])
    data = dataset(
        SentenceRules(64), source=source, documents=range(4), name="wiki", notify=told.append
    )
    assert len(data) == 1
    assert told == [
        "wiki: 2 of 4 documents have fewer than 2 sentences, 1 have a sentence of more than 512 "
        "tokens: they are left out"
    ]


@pytest.mark.parametrize(
    ("documents", "pairs", "message"),
    [
        ([[sentence(9)]] * 3, True, "wiki: 3 of 3 documents .* 2 sentences.*--split-sentences"),
        ([[sentence(9)]] * 3, True, "--bert-no-binary-head"),
        ([[sentence(513), sentence(1)]], True, "1 have a sentence of more than 512"),
        ([[], []], False, "2 of 2 documents have fewer than 1 sentences.*--split-sentences"),
    ],
)
def test_no_sample_at_all(documents: Any, pairs: bool, message: str) -> None:
    with pytest.raises(DataError, match=message):
        dataset(
            SentenceRules(64, pairs=pairs),
            source=SentenceSource(documents),
            documents=range(len(documents)),
            name="wiki",
        )


@pytest.mark.parametrize("wrong", [-1, SIZE])
def test_ids_outside_the_vocabulary(wrong: int) -> None:
    source = SentenceSource([[sentence(4), np.array([FIRST_WORD, wrong])]])
    data = dataset(SentenceRules(64), source=source, documents=range(1), name="wiki")
    with pytest.raises(
        DataError, match=rf"wiki: document 0 \(sequence 1\), token 1 has id {wrong}"
    ):
        data[0]


def test_three_sentences_are_divided_in_both_ways() -> None:
    source = SentenceSource([[sentence(3), sentence(4), sentence(5)]])
    rules = SentenceRules(16, short_seq_prob=0.0)
    data = dataset(rules, 40, source=source, documents=range(1))
    first = [int((data[k]["types"] == 0)[: 12 + 3].sum()) - 2 for k in range(40)]
    counts = {size: first.count(size) for size in (3, 9, 7, 5)}  # A, or B where swapped
    assert sum(counts.values()) == 40
    assert min(counts.values()) >= 4


def test_empty_sentences_are_harmless() -> None:
    source = SentenceSource([[sentence(0), sentence(0)], [sentence(0), sentence(3)]])
    data = dataset(SentenceRules(16), 8, source=source, documents=range(2))
    lengths = {int((data[k]["documents"] == 0).sum()) for k in range(8)}
    assert lengths <= {2, 6, 5}
    with pytest.raises(IndexError):
        data[len(data)]
