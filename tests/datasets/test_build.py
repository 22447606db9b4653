"""From data options to datasets: splits, blends, per-split paths, mock data, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtk.config.pretrain import DataConfig
from mtk.data.blend import BlendedDataset
from mtk.data.build import SampleCounts, Splits, build_splits
from mtk.data.gpt_dataset import GPTDataset
from mtk.data.gpt_samples import GPTSamples
from mtk.data.token_source import SampleDataset, ignore
from mtk.errors import ConfigError, DataError, MtkError
from tests.datasets.sources import MemorySource, unique_source

LENGTHS = {
    "a": [20] * 1000,
    "b": [7] * 300,
    "tiny": [3, 3],
    "empty": [],
    "long": [50] * 10,
    "edge": [16],
}


class Opener:
    """Opens the sources above, and remembers what was opened."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def __call__(self, prefix: Path) -> MemorySource:
        self.opened.append(prefix.name)
        return unique_source(LENGTHS[prefix.name])


def build(folder: Path, counts: Sequence[int] = (100, 20, 0), **options: Any) -> Splits:
    names = [n for n in ("data_path", "train_data_path", "valid_data_path") if n in options]
    for name in names:
        items = options[name].split()
        options[name] = tuple(str(folder / i) if i in LENGTHS else i for i in items)
    notify = options.pop("notify", ignore)
    known = {name: options.pop(name) for name in ("vocab_size", "eod") if name in options}
    config = DataConfig(**options)
    kind = GPTSamples(config, 16, 1234, **known)
    return build_splits(config, kind, SampleCounts(*counts), Opener(), notify=notify)


def present(dataset: SampleDataset | None) -> SampleDataset:
    assert dataset is not None
    return dataset


def sequences(dataset: SampleDataset | None) -> set[int]:
    found = present(dataset)
    return {p.sequence for k in range(len(found)) for p in found.documents_of(k)}


def test_splits_of_one_dataset_do_not_overlap(tmp_path: Path) -> None:
    splits = build(tmp_path, (1000, 30, 1), data_path="a")
    assert sequences(splits.train) == set(range(969))
    assert sequences(splits.valid) == set(range(969, 999))
    assert sequences(splits.test) == {999}
    assert [len(present(s)) >= n for s, n in ((splits.train, 1000), (splits.valid, 30))] == [
        *(True, True)
    ]


def test_what_is_not_asked_for_is_not_built(tmp_path: Path) -> None:
    opener = Opener()
    config = DataConfig(data_path=(str(tmp_path / "a"),), split="1,1,1")
    splits = build_splits(config, GPTSamples(config, 16, 1), SampleCounts(10, 0, 5), opener)
    assert splits.valid is None
    assert splits.test is not None
    assert opener.opened == ["a"]  # once for all splits


def test_the_beginning_of_training_does_not_depend_on_its_length(tmp_path: Path) -> None:
    for data_path in ("a", "a b", "3 a 1 b"):
        short, long = (
            present(build(tmp_path, (count, 20), data_path=data_path).train)
            for count in (150, 4000)
        )
        assert len(long) >= 4000
        for k in range(150):
            assert short[k]["tokens"].tolist() == long[k]["tokens"].tolist()
            assert short.source_of(k) == long.source_of(k)


def test_evaluation_sets_are_fixed(tmp_path: Path) -> None:
    one = present(build(tmp_path, (10, 20), data_path="a").valid)
    two = present(build(tmp_path, (5000, 20), data_path="a").valid)
    assert [one[k]["tokens"].tolist() for k in range(20)] == [
        two[k]["tokens"].tolist() for k in range(20)
    ]


def test_small_evaluation_sets_are_taken_once_and_said_so(tmp_path: Path) -> None:
    told: list[str] = []
    splits = build(tmp_path, (10, 100), data_path="a", notify=told.append)
    assert len(present(splits.valid)) == 37
    assert any("has 37 samples, fewer than the 100 asked for" in message for message in told)


def test_blends(tmp_path: Path) -> None:
    train = present(build(tmp_path, (100, 20), data_path="3 a 1 b").train)
    assert isinstance(train, BlendedDataset)
    assert len(train) == 100
    names = [Path(train.source_of(k)).name for k in range(100)]
    assert (names.count("a"), names.count("b")) == (75, 25)
    single = build(tmp_path, (100, 20), data_path="2.0 a").train
    assert isinstance(single, GPTDataset | BlendedDataset)


@pytest.mark.parametrize("order", ["megatron", "epochs"])
def test_blend_by_length_draws_each_sample_once(tmp_path: Path, order: str) -> None:
    # 1000 * 20 and 300 * 7 tokens: 969 and 291 sequences in training, 1211 and 127 samples.
    counts = (1338, 1)
    train = present(build(tmp_path, counts, data_path="a b", data_order=order).train)
    assert isinstance(train, BlendedDataset)
    found = {train.locate(k) for k in range(len(train))}
    assert len(found) == len(train) == 1338


def test_blend_by_length_begins_again_only_by_epochs(tmp_path: Path) -> None:
    train = present(build(tmp_path, (5000, 1), data_path="a b").train)
    assert len(train) == 5000
    with pytest.raises(DataError, match=r"5000 samples are needed, but .* have 1338"):
        build(tmp_path, (5000, 1), data_path="a b", data_order="megatron")


def test_paths_for_each_split(tmp_path: Path) -> None:
    told: list[str] = []
    splits = build(
        tmp_path, (10, 5, 5), train_data_path="a", valid_data_path="b", notify=told.append
    )
    assert Path(present(splits.train).source_of(0)).name == "a"
    assert Path(present(splits.valid).source_of(0)).name == "b"
    assert splits.test is None
    assert "no --test-data-path: there is no test split" in told
    assert sequences(splits.valid) <= set(range(300))


def test_mock_data(tmp_path: Path) -> None:
    splits = build(tmp_path, (10, 5, 5), mock_data=True, vocab_size=1000, eod_mask_loss=True)
    valid = present(splits.valid)
    assert min(p.sequence for k in range(50) for p in valid.documents_of(k)) >= 33333
    train = present(splits.train)
    for k in range(10):
        sample = train[k]
        assert (sample["loss_mask"] == (sample["tokens"] != 999)).all()
    assert list(tmp_path.iterdir()) == []


def test_caches_lie_beside_the_data_or_where_told(tmp_path: Path) -> None:
    build(tmp_path, data_path="1 a 1 b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.cache", "b.cache"]
    other = tmp_path / "other"
    build(tmp_path, (9, 0), data_path="long", data_cache_path=str(other))
    assert len([p for p in other.iterdir() if p.is_dir()]) == 1
    assert not (tmp_path / "long.cache").exists()


REFUSED: dict[str, tuple[dict[str, Any], type[MtkError], str]] = {
    "empty validation": (
        {"data_path": "long"},
        DataError,
        r"valid split of --split 969,30,1 is empty.* 10 sequences .* sequence: --split 949,50,1",
    ),
    "one sequence, but no sample": (
        {"data_path": "b", "split": "299,1,0"},
        DataError,
        r"b: the valid split has 1 of 300 sequences with 7 tokens, fewer than one sample of "
        r"16 \+ 1. Lower --seq-length, raise its share in --split 299,1,0, or use more data",
    ),
    "training shorter than a sample": (
        {"train_data_path": "tiny"},
        DataError,
        "train split has 2 of 2 sequences with 6 tokens.*Lower --seq-length, or use more",
    ),
    "a sample without its last label": (
        {"train_data_path": "edge"},
        DataError,
        "train split has 1 of 1 sequences with 16 tokens, fewer than one sample of 16",
    ),
    "no sequence at all": ({"data_path": "empty"}, DataError, "the dataset is empty"),
    "no share for training": ({"data_path": "a", "split": "0,1,1"}, DataError, "no training data"),
    "only validation": ({"valid_data_path": "a"}, DataError, "no training data"),
    "split grammar": ({"data_path": "a", "split": "x"}, ConfigError, r"data\.split"),
    "blend grammar": ({"data_path": "1 a x b"}, DataError, "item 3, 'x'"),
    "blend part too small": (
        {"train_data_path": "1 a 1 tiny"},
        DataError,
        "tiny: the train split has",
    ),
    "mock without vocabulary": ({"mock_data": True}, ConfigError, r"model\.vocab_size"),
    "eod mask without eod": (
        {"data_path": "a", "eod_mask_loss": True},
        ConfigError,
        "end-of-document",
    ),
    "packed documents without eod, both options at once": (
        {"data_path": "a", "reset_attention_mask": True, "reset_position_ids": True},
        ConfigError,
        r"(?s)data\.reset_attention_mask.*end-of-document.*data\.reset_position_ids",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_refusals(tmp_path: Path, case: tuple[dict[str, Any], type[MtkError], str]) -> None:
    options, kind, message = case
    with pytest.raises(kind, match=message):
        build(tmp_path, (50, 5), **options)
    assert list(tmp_path.glob("*/*")) in ([], list(tmp_path.glob("*.cache/*")))


def test_the_suggested_split_works(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        build(tmp_path, (50, 2, 2), data_path="long")
    suggested = str(caught.value).split("sequence: --split ")[1].split(", or")[0]
    splits = build(tmp_path, (50, 2), data_path="long", split=suggested)
    assert np.array_equal(sorted(sequences(splits.valid)), [9])


def test_ids_are_checked_with_the_name_of_the_dataset(tmp_path: Path) -> None:
    train = present(build(tmp_path, (50, 5), data_path="a", vocab_size=10).train)
    with pytest.raises(DataError, match=r"a: document \d+ .* but the model's vocabulary has 10"):
        train[0]
