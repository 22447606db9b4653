"""The mapping of sentences to samples: golden values, a plain version, orders, refusals."""

from __future__ import annotations

import math
from itertools import islice, pairwise

import numpy as np
import pytest

from mtk.data.gpt_indices import Order
from mtk.data.mersenne import mt19937
from mtk.data.sentence_indices import MappingRules, build_mapping, usable_documents
from tests.datasets.masked import random_source
from tests.datasets.test_mersenne import slow_64

LENGTHS = np.array([10, 12, 8, 20, 5, 7, 9, 11, 30, 6, 6, 6, 15, 4, 3, 2], dtype=np.int32)
STARTS = np.array([0, 4, 5, 9, 12, 16])


def mapping(
    rules: MappingRules,
    samples: int | None = None,
    order: Order = "megatron",
    *,
    seed: int = 1234,
    sizes: np.ndarray = LENGTHS,
    starts: np.ndarray = STARTS,
) -> np.ndarray:
    corpus = usable_documents(sizes, starts, rules.least)
    return build_mapping(corpus, rules, seed, samples, order, len(sizes))


def test_golden_values_of_megatron() -> None:
    pairs = mapping(MappingRules(32, 0.1, 2))
    assert pairs.tolist() == [[9, 12, 32], [0, 4, 32], [5, 9, 32], [12, 16, 32]]
    assert pairs.dtype == np.uint32
    single = mapping(MappingRules(32, 0.1, 1)).tolist()
    assert single == [[4, 5, 32], [0, 4, 32], [5, 9, 32], [12, 16, 32], [9, 12, 32]]
    many = mapping(MappingRules(32, 0.5, 2), 20)
    assert len(many) == 23
    assert many[:6].tolist() == [
        *([9, 12, 8], [5, 9, 32], [12, 14, 18]),
        *([12, 16, 25], [14, 16, 32], [0, 2, 17]),
    ]


def plain(
    sizes: list[int], starts: list[int], rules: MappingRules, seed: int, samples: int | None
) -> list[list[list[int]]]:
    """Rows of each epoch before shuffling, sentence by sentence."""
    drawn = iter(np.concatenate(list(islice(mt19937(seed), 4))).tolist())

    def target() -> int:
        if not rules.short:
            return rules.longest
        number = next(drawn)
        if number % math.floor(1 / rules.short + 0.5) == 0:
            return int(2 + number % (rules.longest - 1))
        return rules.longest

    epochs: list[list[list[int]]] = []
    while not epochs or (samples is not None and sum(map(len, epochs)) < samples):
        rows: list[list[int]] = []
        for first, last in pairwise(starts):
            count = last - first
            long = count > 1 and any(size > 512 for size in sizes[first:last])
            if count < rules.least or long:
                continue
            begin, tokens, wanted = first, 0, target()
            for i in range(first, last):
                tokens += sizes[i]
                left, taken = last - i - 1, i + 1 - begin
                full = tokens >= wanted and left > 1 and taken >= rules.least
                if full or not left:
                    rows.append([begin, i + 1, wanted])
                    begin, tokens, wanted = i + 1, 0, target()
        epochs.append(rows)
    return epochs


def shuffle(rows: list[list[int]], numbers: object) -> None:
    for i in range(len(rows) - 1, 0, -1):
        j = next(numbers) % (i + 1)  # type: ignore[call-overload]
        rows[i], rows[j] = rows[j], rows[i]


@pytest.mark.parametrize("order", ["epochs", "megatron"])
def test_equals_the_plain_version(order: Order) -> None:
    rng = np.random.default_rng(5)
    compared = 0
    while compared < 60:
        source = random_source(rng, int(rng.integers(1, 40)), long=0.01)
        rules = MappingRules(
            int(rng.integers(2, 200)), float(rng.choice([0.0, 0.1, 0.6, 1.0])), compared % 2 + 1
        )
        starts = source.document_indices
        if not len(usable_documents(source.sizes, starts, rules.least).begins):
            continue
        samples, seed = int(rng.integers(1, 250)), int(rng.integers(0, 2**32))
        found = mapping(rules, samples, order, seed=seed, sizes=source.sizes, starts=starts)
        epochs = plain(source.sizes.tolist(), starts.tolist(), rules, seed, samples)
        numbers = slow_64(seed + 1)
        if order == "megatron":
            epochs = [[row for rows in epochs for row in rows]]
        for rows in epochs:
            shuffle(rows, numbers)
        assert found.tolist() == [row for rows in epochs for row in rows]
        compared += 1


def test_a_longer_training_begins_the_same() -> None:
    rules = MappingRules(32, 0.5, 1)
    short, long = mapping(rules, 30, "epochs"), mapping(rules, 500, "epochs")
    assert len(long) >= 500 > len(short) >= 30
    assert long[: len(short)].tolist() == short.tolist()
    assert mapping(rules, 500)[: len(short)].tolist() != short.tolist()
    assert mapping(rules, None, "epochs").tolist() == mapping(rules).tolist()


def test_every_sentence_of_an_epoch_comes_once() -> None:
    source = random_source(np.random.default_rng(3), 300, long=0.002)
    found = mapping(MappingRules(100, 0.1, 2), sizes=source.sizes, starts=source.document_indices)
    sentences = np.concatenate([np.arange(begin, end) for begin, end, _ in found.tolist()])
    assert len(np.unique(sentences)) == len(sentences)
    corpus = usable_documents(source.sizes, source.document_indices, 2)
    assert len(sentences) == int((corpus.ends - corpus.begins).sum())
    assert corpus.few > 0 and corpus.long > 0
    assert corpus.few + corpus.long + len(corpus.begins) == 300


def test_a_long_sentence_is_only_taken_alone() -> None:
    sizes = np.array([513, 513, 9, 512, 512], dtype=np.int32)
    found = mapping(MappingRules(32, 0.0, 1), sizes=sizes, starts=np.array([0, 1, 3, 5]))
    assert sorted(found[:, :2].tolist()) == [[0, 1], [3, 5]]


def test_a_part_of_the_documents_counts_from_its_first_sentence() -> None:
    found = mapping(MappingRules(32, 0.1, 2), starts=STARTS[2:])
    assert sorted(found[:, 0].tolist()) == [5, 9, 12]


def test_a_corpus_without_usable_documents_is_refused() -> None:
    corpus = usable_documents(LENGTHS[4:5], np.array([0, 1]), 2)
    assert (corpus.few, corpus.long) == (1, 0)
    with pytest.raises(ValueError, match="no document"):
        build_mapping(corpus, MappingRules(32, 0.1, 2), 1, None, "epochs", 1)


def test_more_sentences_than_32_bits_count() -> None:
    rules = MappingRules(32, 0.1, 2)
    corpus = usable_documents(LENGTHS, STARTS, 2)
    assert build_mapping(corpus, rules, 1, None, "megatron", 2**32 - 1).dtype == np.uint32
    assert build_mapping(corpus, rules, 1, None, "megatron", 2**32).dtype == np.uint64
