"""The prefetching loader: order, errors, closing."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from mtk.data.gpt_dataset import GPTDataset
from mtk.data.loader import BatchLoader
from mtk.data.sampler import micro_batches
from mtk.errors import DataError
from tests.datasets.sources import MemorySource, unique_source


def threads() -> int:
    return sum(thread.name == "mtk-batches" for thread in threading.enumerate())


def dataset(count: int = 64) -> GPTDataset:
    return GPTDataset(unique_source([7, 9, 40, 200]), np.arange(4), 8, count, 1)


def test_batches_in_order() -> None:
    data = dataset()
    with BatchLoader(data, micro_batches(8, 64, lambda _: 8, 4), prefetch=2) as loader:
        batches = list(loader)
        assert next(iter(loader), None) is None  # stays at its end
    assert [i for batch in batches for i in batch.indices_B] == list(range(8, 64))
    for batch in batches:
        assert batch.tokens_BS.shape == batch.labels_BS.shape == batch.loss_mask_BS.shape == (4, 8)
        assert batch.tokens_BS.dtype == batch.labels_BS.dtype == torch.int64
        assert batch.loss_mask_BS.dtype == torch.float32
        for row, k in enumerate(batch.indices_B):
            assert batch.tokens_BS[row].tolist() == data[k]["tokens"].tolist()
            assert batch.labels_BS[row].tolist() == data[k]["labels"].tolist()
    assert threads() == 0


def test_an_error_comes_in_its_place() -> None:
    source = MemorySource([np.arange(100), np.full(20, 999)])
    data = GPTDataset(source, np.arange(2), 8, None, 1, vocab_size=500)
    bad = next(k for k in range(len(data)) if 1 in {p.sequence for p in data.documents_of(k)})
    good = next(k for k in range(len(data)) if {p.sequence for p in data.documents_of(k)} == {0})
    plan = [np.array([good]), np.array([good]), np.array([bad]), np.array([good])]
    with BatchLoader(data, plan, prefetch=1) as loader:
        assert next(loader).indices_B == (good,)
        assert next(loader).indices_B == (good,)
        for _ in range(2):
            with pytest.raises(DataError, match="document 1"):
                next(loader)
    assert threads() == 0


def test_twenty_five_restarts_read_the_same_tokens() -> None:
    """Runs of three epochs that are stopped anywhere, on 1, 2 or 4 ranks, with any length."""
    rng = np.random.default_rng(1)
    data, longer = dataset(96), dataset(1000)  # 31 samples an epoch
    whole = [data[k]["tokens"].tolist() for k in range(96)]
    stops = sorted(8 * rng.choice(np.arange(1, 12), size=5, replace=False))
    for _ in range(5):
        read: list[list[int]] = []
        for begin, end in zip([0, *stops], [*stops, 96], strict=True):
            world = int(rng.choice([1, 2, 4]))
            source = (data, longer)[int(rng.integers(2))]
            ranks = []
            for rank in range(world):
                plan = micro_batches(int(begin), int(end), lambda _: 8, 2, rank, world)
                with BatchLoader(source, plan, prefetch=2) as loader:
                    ranks.append([batch.tokens_BS for batch in loader])
            for parts in zip(*ranks, strict=True):
                read += torch.cat(parts).tolist()
        assert read == whole


class Counting:
    """Counts reads, and is slow."""

    def __init__(self) -> None:
        self.read = 0
        self.inner = dataset()

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, k: int) -> dict:
        self.read += 1
        return self.inner[k % 64]

    def documents_of(self, k: int) -> list:
        return self.inner.documents_of(k % 64)

    def source_of(self, k: int) -> str:
        return ""


def test_reads_no_further_ahead_than_allowed_and_closes_while_full() -> None:
    data = Counting()
    loader = BatchLoader(data, ([k] for k in range(10**9)), prefetch=3)
    next(loader)
    time.sleep(0.2)
    assert data.read <= 1 + 3 + 1  # taken, waiting, and the one that finds no room
    loader.close()
    loader.close()
    assert threads() == 0
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_an_error_of_the_consumer_closes_too() -> None:
    with (
        pytest.raises(KeyError),
        BatchLoader(Counting(), ([k] for k in range(10**9)), prefetch=2) as loader,
    ):
        next(loader)
        raise KeyError("training failed")
    assert threads() == 0


def test_prefetch_must_be_positive() -> None:
    with pytest.raises(ValueError, match="prefetch"):
        BatchLoader(dataset(), [], prefetch=0)
