"""The same numbers as Megatron-core's own BERT and T5 datasets, and its C++ mapping."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mtk.config.pretrain import DataConfig
from mtk.data.bert_dataset import BertDataset
from mtk.data.build import SampleCounts, build_splits
from mtk.data.sentence_dataset import SentenceRules, Sentences
from mtk.data.sentence_indices import MappingRules, build_mapping, usable_documents
from mtk.data.sentence_samples import SentenceSamples
from mtk.data.t5_dataset import T5Dataset
from mtk.data.token_source import TokenSource
from tests.datasets.masked import (
    BERT_GOLDEN,
    BERT_RULES,
    BOS,
    CLS,
    EOS,
    FIRST_SENTINEL,
    FIRST_WORD,
    MASK,
    PAD,
    SEP,
    T5_GOLDEN,
    T5_RULES,
    fingerprint,
    golden_source,
    pieces,
    random_source,
    vocabulary,
)

pytestmark = pytest.mark.slow  # importing Megatron-core takes seconds


@pytest.fixture(scope="module")
def mcore() -> Iterator[SimpleNamespace]:
    pytest.importorskip("megatron.core")
    patch = pytest.MonkeyPatch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from megatron.core.datasets import bert_dataset, helpers, t5_dataset
        from megatron.core.datasets.blended_megatron_dataset_builder import (
            BlendedMegatronDatasetBuilder,
        )
        from megatron.core.datasets.utils import Split

        # It asks torch.distributed for its rank; one process is rank 0.
        patch.setattr(torch.distributed, "get_rank", lambda *_: 0)
        yield SimpleNamespace(
            bert=bert_dataset,
            t5=t5_dataset,
            helpers=helpers,
            builder=BlendedMegatronDatasetBuilder,
            split=Split,
        )
    patch.undo()


class Low:
    """A token source as Megatron-core's low-level dataset."""

    def __init__(self, source: TokenSource) -> None:
        self._source = source
        self.sequence_lengths = source.sizes
        self.document_indices = source.document_indices
        self.path_prefix = "memory"

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> np.ndarray:
        return np.asarray(self._source.get(int(i)))


def settings(mcore: SimpleNamespace, family: str, rules: SentenceRules, **options: Any) -> Any:
    tokenizer = SimpleNamespace(
        cls=CLS,
        sep=SEP,
        mask=MASK,
        pad=PAD,
        bos=BOS,
        eos=EOS,
        eod=EOS,
        inv_vocab=dict(enumerate(pieces())),
        additional_special_tokens_ids=list(range(FIRST_SENTINEL, FIRST_WORD)),
        special_tokens_dict={},
        unique_identifiers={},
    )
    own: dict[str, Any] = (
        {"classification_head": rules.pairs}
        if family == "bert"
        else {"sequence_length_decoder": rules.decoder_length}
    )
    kind = {
        "bert": mcore.bert.BERTMaskedWordPieceDatasetConfig,
        "t5": mcore.t5.T5MaskedWordPieceDatasetConfig,
    }[family]
    return kind(
        sequence_length=rules.length,
        tokenizer=tokenizer,
        masking_probability=rules.mask_prob,
        short_sequence_probability=rules.short_seq_prob,
        masking_max_ngram=3 if family == "bert" else 10,
        masking_do_full_word=True,
        masking_do_permutation=False,
        masking_use_longer_ngrams=False,
        masking_use_geometric_distribution=family == "t5",
        **own,
        **options,
    )


def same_bert(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert np.array_equal(found["tokens"], wanted["text"])
    assert np.array_equal(found["types"], wanted["types"])
    assert np.array_equal(found["loss_mask"], wanted["loss_mask"])
    masked = found["loss_mask"] == 1
    # Megatron-core takes a masked token that became [PAD] by chance for padding; mtk does not.
    real = (wanted["padding_mask"] == 1) | masked
    assert np.array_equal(found["documents"], 1 - real)
    assert np.array_equal(found["labels"][masked], wanted["labels"][masked])
    assert (found["labels"][~masked] == 0).all()
    assert int(found.get("order", 0)) == wanted["is_random"]


def same_t5(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert np.array_equal(found["tokens"], wanted["text_enc"])
    assert np.array_equal(found["documents"], 1 - wanted["enc_mask"])
    assert np.array_equal(found["decoder_tokens"], wanted["text_dec"])
    assert np.array_equal(found["loss_mask"], wanted["loss_mask"])
    masked = found["loss_mask"] == 1
    assert np.array_equal(found["labels"][masked], wanted["labels"][masked])


def test_mapping(mcore: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    compared = 0
    while compared < 400:
        source = random_source(rng, int(rng.integers(1, 30)), long=0.01)
        documents = len(source.document_indices) - 1
        first = int(rng.integers(0, documents))
        starts = source.document_indices[first : int(rng.integers(first + 1, documents + 1)) + 1]
        rules = MappingRules(
            int(rng.integers(2, 120)),
            float(rng.choice([0.0, 0.1, 0.4, 0.5, 1.0, rng.random()])),
            int(rng.integers(1, 3)),
        )
        seed = int(rng.integers(1, 2**31 - 1))
        corpus = usable_documents(source.sizes, starts, rules.least)
        if not len(corpus.begins):
            continue
        samples = None if rng.random() < 0.3 else int(rng.integers(1, 300))
        epochs, most = (1, 2**62) if samples is None else (2**31 - 2, samples)
        wanted = mcore.helpers.build_mapping(
            starts, source.sizes, epochs, most, rules.longest, rules.short, seed, False, rules.least
        )
        found = build_mapping(corpus, rules, seed, samples, "megatron", len(source.sizes))
        assert found.dtype == wanted.dtype
        assert np.array_equal(found, wanted)
        if samples is None:
            by_epochs = build_mapping(corpus, rules, seed, None, "epochs", len(source.sizes))
            assert np.array_equal(by_epochs, wanted)
        compared += 1


RULES = [
    SentenceRules(128),
    SentenceRules(128, pairs=False),
    SentenceRules(32, 40, 0.3, 0.5),
    SentenceRules(512, 400, 0.5, 0.0),
    SentenceRules(48, 64, 0.15, 1.0, pairs=False),
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_items(mcore: SimpleNamespace, family: str, rules: SentenceRules, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    source = random_source(rng, 60, long=0.005)
    config = settings(mcore, family, rules, random_seed=2**32 - 50, path_to_cache=str(tmp_path))
    config.mock = True
    kind = {
        "bert": mcore.bert.BERTMaskedWordPieceDataset,
        "t5": mcore.t5.T5MaskedWordPieceDataset,
    }[family]
    # The C++ mapping takes seeds below 2^31 only; items take any.
    config.random_seed = 1234
    wanted = kind(Low(source), None, np.arange(3, 55), 300, mcore.split.train, config)
    config.random_seed = 2**32 - 50
    own = {"bert": BertDataset, "t5": T5Dataset}[family]
    found = own(Sentences(source, range(3, 55), vocabulary()), rules, 300, 1234, "megatron")
    found._seed = 2**32 - 50
    assert len(found) == len(wanted) >= 300
    same = {"bert": same_bert, "t5": same_t5}[family]
    for k in range(len(found)):
        same(found[k], wanted[k])


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_golden_values(mcore: SimpleNamespace, family: str, tmp_path: Path) -> None:
    """What the fast tests compare with is what Megatron-core gives."""
    rules = {"bert": BERT_RULES, "t5": T5_RULES}[family]
    config = settings(mcore, family, rules, random_seed=1234, path_to_cache=str(tmp_path))
    config.mock = True
    kind = {
        "bert": mcore.bert.BERTMaskedWordPieceDataset,
        "t5": mcore.t5.T5MaskedWordPieceDataset,
    }[family]
    data = kind(Low(golden_source()), None, np.arange(3), 6, mcore.split.train, config)
    keys = {
        "bert": ("text", "types", "labels", "loss_mask", "is_random"),
        "t5": ("text_enc", "text_dec", "labels", "loss_mask"),
    }[family]
    samples = [dict(data[k]) for k in range(len(data))]
    for sample in samples:  # where there is no loss, mtk's labels are 0
        sample["labels"] = sample["labels"] * sample["loss_mask"]
    wanted = {"bert": BERT_GOLDEN, "t5": T5_GOLDEN}[family]
    assert fingerprint(samples, keys) == wanted


SOURCES = {name: random_source(np.random.default_rng(i), 300) for i, name in enumerate("abc")}


@pytest.mark.parametrize("counts", [(100, 20, 2), (5000, 20, 2)])
@pytest.mark.parametrize(
    "items", [("a",), ("0.3", "a", "0.7", "b"), ("1", "c", "2", "a", "4", "b")]
)
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_whole_builder(
    mcore: SimpleNamespace,
    family: str,
    items: tuple[str, ...],
    counts: tuple[int, int, int],
    tmp_path: Path,
) -> None:
    base: Any = {
        "bert": mcore.bert.BERTMaskedWordPieceDataset,
        "t5": mcore.t5.T5MaskedWordPieceDataset,
    }[family]

    class InMemory(base):  # type: ignore[misc]
        @staticmethod
        def build_low_level_dataset(dataset_path: str, _: Any) -> Low:
            return Low(SOURCES[dataset_path])

    weighted = len(items) > 1
    blend = (list(items[1::2]), [float(w) for w in items[::2]]) if weighted else (list(items), None)
    rules = SentenceRules(64, 64)
    config = settings(
        mcore,
        family,
        rules,
        random_seed=42,
        blend=blend,
        split="900,80,20",
        path_to_cache=str(tmp_path / "mcore"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = mcore.builder(InMemory, counts, lambda: True, config).build()
    options = DataConfig(data_path=items, split="900,80,20", data_order="megatron")
    found = build_splits(
        options,
        SentenceSamples(options, family, rules, 42, vocabulary()),  # type: ignore[arg-type]
        SampleCounts(*counts),
        lambda prefix: SOURCES[prefix.name],
        cache_path=tmp_path / "mtk",
    )
    same = {"bert": same_bert, "t5": same_t5}[family]
    for one, other in zip((found.train, found.valid, found.test), built, strict=True):
        assert one is not None
        assert len(one) == len(other)
        for k in range(0, len(other), 7):
            same(one[k], other[k])
