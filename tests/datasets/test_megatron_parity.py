"""The same numbers as Megatron-core's own GPTDataset, BlendedDataset and builder."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mtk.config.pretrain import DataConfig
from mtk.data.blend_indices import blending_indices, exhaustive_blending_indices
from mtk.data.build import SampleCounts, build_splits
from mtk.data.gpt_dataset import GPTDataset
from mtk.data.gpt_indices import build_indices, plan_indices
from mtk.data.gpt_samples import GPTSamples
from mtk.data.loader import BatchLoader
from mtk.data.mock import MockSource
from mtk.data.packing import Packing
from mtk.models.attention import document_mask
from tests.datasets.sources import MemorySource, random_lengths, unique_source

pytestmark = pytest.mark.slow  # importing Megatron-core takes seconds

EOD = 0


@pytest.fixture(scope="module")
def mcore() -> SimpleNamespace:
    pytest.importorskip("megatron.core")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import gpt_dataset, helpers
        from megatron.core.datasets.blended_megatron_dataset_builder import (
            BlendedMegatronDatasetBuilder,
        )
        from megatron.core.datasets.utils import Split
    return SimpleNamespace(
        gpt=gpt_dataset, helpers=helpers, builder=BlendedMegatronDatasetBuilder, split=Split
    )


class Low:
    """A token source as Megatron-core's low-level dataset."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self.sequence_lengths = source.sizes
        self.path_prefix = "memory"

    def __len__(self) -> int:
        return len(self._source)

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        return self._source.get(int(idx), int(offset), None if length is None else int(length))


def config(mcore: SimpleNamespace, sequence_length: int, seed: int, **options: Any) -> Any:
    tokenizer = SimpleNamespace(vocab_size=10**6, eod=EOD, unique_identifiers={})
    return mcore.gpt.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        tokenizer=tokenizer,
        **{
            "eod_mask_loss": False,
            "reset_position_ids": False,
            "reset_attention_mask": False,
            "create_attention_mask": False,
            **options,
        },
    )


def reference(
    mcore: SimpleNamespace, source: Any, size: int, samples: int | None, seed: int, **options: Any
) -> Any:
    documents = np.arange(len(source), dtype=np.int32)
    split = (
        mcore.split.valid
        if "drop_last_partial_validation_sequence" in options
        else (mcore.split.train)
    )
    settings = config(mcore, size, seed, **options)
    settings.mock = True  # keeps its cache off the disk
    return mcore.gpt.GPTDataset(Low(source), None, documents, samples, split, settings)


def test_indices_for_many_lengths_and_sizes(mcore: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    compared = separate = 0
    while compared < 300:
        lengths = random_lengths(rng, most=int(rng.integers(2, 400)))
        size = int(rng.integers(2, 300))
        samples = None if rng.random() < 0.2 else int(rng.integers(1, 400))
        extra = bool(rng.random() < 0.8)
        seed = int(rng.integers(0, 2**32))
        source = unique_source(lengths.tolist())
        total = int(lengths.sum())
        plan = plan_indices(total, size, samples, order="megatron", extra_token=int(extra))
        if total < 2 or not plan.samples:
            continue
        wanted = reference(mcore, source, size, samples, seed, add_extra_token_to_sequence=extra)
        found = build_indices(lengths, np.arange(len(lengths)), seed, plan)
        for name in ("document", "sample", "shuffle"):
            one, other = getattr(found, name), getattr(wanted, f"{name}_index")
            assert one.dtype == other.dtype
            assert np.array_equal(one, other)
        compared += 1
        separate += len(plan.stretches) == 2
    assert separate > 30


def test_partial_samples(mcore: SimpleNamespace) -> None:
    rng = np.random.default_rng(1)
    for _ in range(40):
        lengths = random_lengths(rng)
        size = int(rng.integers(2, 60))
        whole = unique_source(lengths.tolist())
        source = MemorySource([whole.get(i) + 1 for i in range(len(whole))])
        # Without a mask option Megatron-core keeps the first item's loss mask, padding and all,
        # for every later item. An EOD that never occurs turns that off.
        options = {"drop_last_partial_validation_sequence": False, "eod_mask_loss": True}
        wanted = reference(mcore, source, size, None, 7, **options)
        found = GPTDataset(
            source, np.arange(len(lengths)), size, None, 7, "megatron", drop_last=False
        )
        assert len(found) == len(wanted)
        for k in range(len(found)):
            compare(found[k], wanted[k])


def compare(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in ("tokens", "labels", "loss_mask"):
        other = wanted[key].numpy()
        assert found[key].dtype == other.dtype
        assert np.array_equal(found[key], other)


@pytest.mark.parametrize("eod_mask_loss", [False, True])
def test_items(mcore: SimpleNamespace, eod_mask_loss: bool) -> None:
    rng = np.random.default_rng(2)
    source = MemorySource(
        [np.append(rng.integers(1, 90, size=n), EOD) for n in rng.integers(0, 50, size=60)]
    )
    for samples in (None, 50, 200):
        wanted = reference(mcore, source, 32, samples, 1234, eod_mask_loss=eod_mask_loss)
        found = GPTDataset(source, np.arange(60), 32, samples, 1234, "megatron", EOD, eod_mask_loss)
        assert len(found) == len(wanted)
        for k in range(len(found)):
            compare(found[k], wanted[k])


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("positions", [False, True])
def test_packed_documents(mcore: SimpleNamespace, attention: bool, positions: bool) -> None:
    rng = np.random.default_rng(4)
    source = MemorySource(
        [np.append(rng.integers(1, 90, size=n), EOD) for n in rng.integers(0, 25, size=80)]
    )
    options = {"reset_attention_mask": attention, "reset_position_ids": positions}
    wanted = reference(mcore, source, 32, None, 5, create_attention_mask=True, **options)
    found = GPTDataset(source, np.arange(80), 32, None, 5, "megatron", EOD)
    packing = Packing(EOD, attention, positions)
    with BatchLoader(found, [np.arange(len(found))], packing=packing) as loader:
        batch = next(loader)
    places = torch.arange(32).expand(len(found), 32)
    own = places if batch.positions_BS is None else batch.positions_BS
    documents = torch.zeros_like(places) if batch.documents_BS is None else batch.documents_BS
    masked = ~document_mask(documents)  # Megatron-core's True is mtk's False
    assert len(found) == len(wanted) > 20
    for k in range(len(found)):
        assert torch.equal(own[k], wanted[k]["position_ids"])
        assert torch.equal(masked[k], wanted[k]["attention_mask"])


def test_one_epoch_by_epochs_is_the_same(mcore: SimpleNamespace) -> None:
    source = unique_source([30, 1, 0, 77, 5, 64] * 9)
    wanted = reference(mcore, source, 16, None, 99)
    found = GPTDataset(source, np.arange(54), 16, len(wanted), 99, "epochs")
    assert len(found) == len(wanted)
    for k in range(len(found)):
        compare(found[k], wanted[k])


def test_blending_indices(mcore: SimpleNamespace) -> None:
    rng = np.random.default_rng(3)
    for _ in range(60):
        count = int(rng.integers(1, 40))
        weights = rng.dirichlet(np.full(count, 0.3)) + 1e-7
        weights = weights / weights.sum()
        size = int(rng.integers(1, 30000))
        dataset, sample = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
        mcore.helpers.build_blending_indices(dataset, sample, weights, count, size, False)
        found = blending_indices(weights, size)
        assert np.array_equal(found.dataset, dataset)
        assert np.array_equal(found.sample, sample)
        sizes = rng.integers(1, 900, size=count)
        total = int(sizes.sum())
        dataset, sample = np.zeros(total, dtype=np.int16), np.zeros(total, dtype=np.int64)
        mcore.helpers.build_exhaustive_blending_indices(dataset, sample, sizes, count)
        spent = exhaustive_blending_indices(sizes)
        assert np.array_equal(spent.dataset, dataset)
        assert np.array_equal(spent.sample, sample)


SOURCES = {
    "a": unique_source([20] * 1000),
    "b": unique_source([7, 0, 90] * 300),
    "c": unique_source(np.random.default_rng(4).integers(0, 80, size=500).tolist()),
}


# 3953: three tenths of it are one epoch of "a", which the surplus makes two.
@pytest.mark.parametrize("counts", [(100, 20, 2), (900, 20, 2), (1300, 40, 2), (3953, 20, 2)])
@pytest.mark.parametrize(
    "items",
    [
        ("a",),
        ("a", "b", "c"),
        ("0.3", "a", "0.7", "b"),
        ("1", "c", "2", "a", "4", "b"),
        ("1", "a"),
    ],
)
def test_whole_builder(
    mcore: SimpleNamespace, items: tuple[str, ...], counts: tuple[int, int, int], tmp_path: Path
) -> None:
    class InMemory(mcore.gpt.GPTDataset):  # type: ignore[misc,name-defined]
        @staticmethod
        def build_low_level_dataset(dataset_path: str, _: Any) -> Low:
            return Low(SOURCES[dataset_path])

    weighted = items[0][0].isdigit()
    blend = (list(items[1::2]), [float(w) for w in items[::2]]) if weighted else (list(items), None)
    settings = config(
        mcore, 16, 42, blend=blend, split="949,45,6", path_to_cache=str(tmp_path / "mcore")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = mcore.builder(InMemory, counts, lambda: True, settings)
        # The builder of blends asks torch.distributed for its rank; one process is rank 0.
        import torch

        patch = pytest.MonkeyPatch()
        patch.setattr(torch.distributed, "get_rank", lambda *_: 0)
        built = wanted.build()
        patch.undo()
    options = DataConfig(data_path=items, split="949,45,6", data_order="megatron")
    found = build_splits(
        options,
        GPTSamples(options, 16, 42),
        SampleCounts(*counts),
        lambda prefix: SOURCES[prefix.name],
        cache_path=tmp_path / "mtk",
    )
    for one, other in zip((found.train, found.valid, found.test), built, strict=True):
        assert one is not None
        if items != ("1", "a"):  # a blend of one: Megatron-core cuts it to the asked size
            assert len(one) == len(other)
        for k in range(len(other)):
            compare(one[k], other[k])


def test_mock_source(mcore: SimpleNamespace) -> None:
    tokenizer = SimpleNamespace(vocab_size=500, eod=499)
    wanted = mcore.gpt.MockGPTLowLevelDataset(tokenizer)
    found = MockSource(500, 499)
    assert np.array_equal(found.sizes, wanted.sequence_lengths)
    for i in (0, 7, 99999):
        assert np.array_equal(found.get(i), wanted.get(i))
        assert np.array_equal(found.get(i, 3, 40), wanted.get(i, 3, 40))
