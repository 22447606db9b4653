"""T5's samples: the decoder's spans put back give the text; room, sentinels, determinism."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mtk.data.masking import mask_budget
from mtk.data.sentence_dataset import SentenceRules, Sentences
from mtk.data.t5_dataset import T5Dataset, spans_expected
from tests.datasets.masked import (
    BOS,
    EOS,
    FIRST_SENTINEL,
    FIRST_WORD,
    PAD,
    T5_GOLDEN,
    T5_NAMES,
    T5_RULES,
    SentenceSource,
    fingerprint,
    golden_source,
    random_source,
    vocabulary,
)

SOURCE = random_source(np.random.default_rng(0), 120)


def dataset(rules: SentenceRules, samples: int = 300, **changes: Any) -> T5Dataset:
    source = changes.pop("source", SOURCE)
    documents = range(len(source.document_indices) - 1)
    return T5Dataset(Sentences(source, documents, vocabulary(**changes)), rules, samples, 1234)


def test_golden_values_of_megatron() -> None:
    sentences = Sentences(golden_source(), range(3), vocabulary())
    data = T5Dataset(sentences, T5_RULES, 6, 1234, "megatron")
    sample = data[0]
    assert sample["tokens"].tolist() == [
        *(180, 185, 190, 195, 200, 205, 210, 215, 220, 225, 6, 196, 201, 206, 211, 202, 207, 212),
        *(7, 232, 237, 242, 213, 218, 223, 228, 233, 238, 243, 248, 253, 258, *([0] * 16)),
    ]
    spans = [6, 230, 235, 240, 245, 191, 7, 217, 222, 227]
    assert sample["decoder_tokens"].tolist() == [BOS, *spans, *([0] * 5)]
    assert sample["labels"].tolist() == [*spans, EOS, *([0] * 5)]
    assert fingerprint((data[k] for k in range(len(data))), T5_NAMES) == T5_GOLDEN


def is_sentinel(token: int) -> bool:
    return FIRST_SENTINEL <= token < FIRST_WORD


def restored(sample: dict[str, Any]) -> list[int]:
    """The encoder's text with each sentinel replaced by its span."""
    labels = sample["labels"][sample["loss_mask"] == 1].tolist()
    assert labels[-1] == EOS
    spans: dict[int, list[int]] = {}
    for token in labels[:-1]:
        if is_sentinel(token):
            spans[token] = []
            last = token
        else:
            spans[last].append(token)
    text = sample["tokens"][sample["documents"] == 0].tolist()
    assert [t for t in text if is_sentinel(t)] == list(spans)
    return [t for token in text for t in (spans[token] if is_sentinel(token) else [token])]


def test_spans_put_back_give_the_text() -> None:
    data = dataset(SentenceRules(128, 64), 400)
    for k in range(len(data)):
        sample = data[k]
        wanted = np.concatenate(data.sentences_of(k))[: data.target_of(k)]
        assert restored(sample) == wanted.tolist()
        decoder, labels, mask = (sample[n] for n in ("decoder_tokens", "labels", "loss_mask"))
        count = int(mask.sum())
        assert decoder[0] == BOS and labels[count - 1] == EOS
        assert decoder[1:count].tolist() == labels[: count - 1].tolist()
        assert mask.tolist() == [1.0] * count + [0.0] * (64 - count)
        assert (decoder[count:] == PAD).all() and (labels[count:] == 0).all()
        sentinels = [t for t in labels.tolist() if is_sentinel(t)]
        assert sentinels == list(range(FIRST_SENTINEL, FIRST_SENTINEL + len(sentinels)))
        assert len(sample["tokens"]) == 128
        budget = mask_budget(0.15, len(wanted), data.target_of(k))
        assert count - 1 - len(sentinels) <= budget


def test_spans_are_long_on_average() -> None:
    text = np.full(510, FIRST_WORD + 1)
    source = SentenceSource([[text]] * 200)
    data = dataset(SentenceRules(512, short_seq_prob=0.0), 200, source=source)
    sentinels = [sum(map(is_sentinel, data[k]["labels"].tolist())) for k in range(200)]
    masked = [int(data[k]["loss_mask"].sum()) - 1 - n for k, n in enumerate(sentinels)]
    assert max(masked) == 76 and min(masked) > 70
    # The mean of the clipped geometric distribution is 4.5 words; refused overlaps shorten it.
    assert 3.5 < sum(masked) / sum(sentinels) < 4.5
    assert max(sentinels) <= spans_expected(0.15, 512) == 38


@pytest.mark.parametrize(
    ("rules", "sentinels"), [(SentenceRules(128, 9), 100), (SentenceRules(128, 64), 2)]
)
def test_what_finds_no_room_stays_in_the_text(rules: SentenceRules, sentinels: int) -> None:
    ids = tuple(range(FIRST_SENTINEL, FIRST_SENTINEL + sentinels))
    few, all_of_them = dataset(rules, sentinels=ids), dataset(SentenceRules(128, 64))
    cut = 0
    for k in range(300):
        sample = few[k]
        assert restored(sample) == restored(all_of_them[k])
        cut += int(sample["loss_mask"].sum() < all_of_them[k]["loss_mask"].sum())
    assert cut > 20


def test_a_sample_depends_on_its_index_only() -> None:
    rules = SentenceRules(64, 48)
    one, other = dataset(rules, 200), dataset(rules, 900)
    for k in reversed(range(200)):
        for name, array in one[k].items():
            assert np.array_equal(array, other[k][name])


def test_an_empty_document_is_no_hindrance() -> None:
    source = SentenceSource([[np.empty(0, dtype=np.int64)]])
    sample = dataset(SentenceRules(16, 8), 1, source=source)[0]
    assert sample["documents"].tolist() == [1] * 16
    assert sample["labels"].tolist() == [EOS] + [0] * 7
