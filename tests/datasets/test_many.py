"""Blends of thousands of datasets: open files, and what they hold."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mtk.config.pretrain import DataConfig
from mtk.data import mapped
from mtk.data.build import SampleCounts, build_splits
from mtk.data.gpt_samples import GPTSamples
from mtk.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from mtk.data.mapped import mapped_bytes
from mtk.errors import DataError

COUNT = 300


@pytest.fixture
def few_files() -> Iterator[None]:
    """As many open files as some systems begin with, in proportion."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def datasets(folder: Path) -> list[str]:
    """Every token of dataset ``n`` is ``n``."""
    for number in range(COUNT):
        with IndexedDatasetWriter(folder / f"d{number}", "<u2") as writer:
            for length in (30, 40):
                writer.add_document(np.full(length, number), [length])
    return [str(folder / f"d{number}") for number in range(COUNT)]


def test_many_small_datasets_need_no_open_files(
    tmp_path: Path, few_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "_raise_limit", lambda: None)
    weights = [f"{1 + number % 3}" for number in range(COUNT)]
    items = [word for pair in zip(weights, datasets(tmp_path), strict=True) for word in pair]
    config = DataConfig(data_path=tuple(items), split="1,0,0")
    kind, counts = GPTSamples(config, 16, 1), SampleCounts(train=1200)
    train = build_splits(config, kind, counts, IndexedDataset, cache_path=tmp_path / "c").train
    assert train is not None and len(train) >= 1200
    drawn = np.zeros(COUNT, dtype=int)
    for k in range(len(train)):
        tokens = train[k]["tokens"]
        assert set(tokens.tolist()) == {int(train[k]["dataset_id"])}
        drawn[tokens[0]] += 1
    shares = np.array([float(weight) for weight in weights])
    assert np.abs(drawn - len(train) * shares / shares.sum()).max() <= 1


def test_large_files_raise_the_limit_and_are_refused_beyond(
    tmp_path: Path, few_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(mapped.READ_BELOW))
    kept = [mapped_bytes(path) for _ in range(400)]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 400 and len(kept) == 400
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    monkeypatch.setattr(mapped, "_raise_limit", lambda: None)
    with pytest.raises(DataError, match=r"as many files open as it may.*ulimit -n"):
        kept += [mapped_bytes(path) for _ in range(400)]
