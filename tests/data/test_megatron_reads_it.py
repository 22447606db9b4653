"""The other implementation: Megatron-core reads our files and we read its files."""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtk.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"
    ),
]
DOCUMENTS: list[list[list[int]]] = [[[1, 2], [3]], [], [[4, 5, 6, 7]], [[8]], []]


@pytest.fixture(scope="module")
def megatron() -> Any:
    with warnings.catch_warnings():
        # It says at import which accelerator packages it misses.
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_both_ways(megatron: Any, tmp_path: Path, dtype: type) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    with IndexedDatasetWriter(ours, dtype) as writer:
        for document in DOCUMENTS:
            tokens = [token for sequence in document for token in sequence]
            writer.add_document(tokens, [len(sequence) for sequence in document])
    builder = megatron.IndexedDatasetBuilder(f"{theirs}.bin", dtype=dtype)
    for document in DOCUMENTS:
        tokens = [token for sequence in document for token in sequence]
        lengths = [len(sequence) for sequence in document]
        builder.add_document(np.array(tokens, np.int64), lengths)
    builder.finalize(f"{theirs}.idx")
    for suffix in ("bin", "idx"):
        digests = [
            hashlib.sha256(Path(f"{prefix}.{suffix}").read_bytes()).hexdigest()
            for prefix in (ours, theirs)
        ]
        assert digests[0] == digests[1], suffix

    read = megatron.IndexedDataset(str(ours))
    mine = IndexedDataset(theirs)
    flat = [sequence for document in DOCUMENTS for sequence in document]
    assert len(read) == len(mine) == len(flat)
    for index, sequence in enumerate(flat):
        assert read[index].tolist() == mine[index].tolist() == sequence
    assert read.get(2, offset=1, length=2).tolist() == mine.get(2, 1, 2).tolist() == [5, 6]
    assert read.document_indices.tolist() == mine.document_indices.tolist()
    assert read.sequence_lengths.tolist() == mine.sizes.tolist()
