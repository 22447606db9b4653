"""Documents inside a sample: numbers and positions, and how the loader hands them on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mtk.data.gpt_dataset import GPTDataset
from mtk.data.loader import BatchLoader
from mtk.data.packing import Packing
from tests.datasets.sources import MemorySource

EOD = 9


def by_hand(row: list[int]) -> tuple[list[int], list[int]]:
    """Token by token: a document ends with its EOD."""
    documents, positions = [], []
    document = position = 0
    for token in row:
        documents.append(document)
        positions.append(position)
        position += 1
        if token == EOD:
            document, position = document + 1, 0
    return documents, positions


ROWS = {
    "none": [1, 2, 3, 4, 5, 6],
    "in the middle": [1, 2, EOD, 4, 5, 6],
    "first": [EOD, 2, 3, 4, 5, 6],
    "last": [1, 2, 3, 4, 5, EOD],
    "two together": [1, EOD, EOD, 4, EOD, 6],
    "only": [EOD] * 6,
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_an_eod_belongs_to_the_document_it_ends(row: list[int]) -> None:
    packing = Packing(EOD, attention=True, positions=True)
    tokens = torch.tensor([row, ROWS["in the middle"]])
    documents, positions = packing.documents(tokens), packing.position_ids(tokens)
    assert documents is not None and positions is not None
    assert documents.dtype == positions.dtype == torch.int64
    assert (documents[0].tolist(), positions[0].tolist()) == by_hand(row)
    assert documents[1].tolist() == [0, 0, 0, 1, 1, 1]
    assert positions[1].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("positions", [False, True])
def test_the_loader_gives_what_was_asked_for(attention: bool, positions: bool) -> None:
    rng = np.random.default_rng(3)
    source = MemorySource(
        [np.append(rng.integers(0, EOD, size=n), EOD) for n in rng.integers(0, 9, size=50)]
    )
    data = GPTDataset(source, np.arange(50), 16, None, 1)
    plan = [np.array([0, 3]), np.array([5])]
    with BatchLoader(data, plan, packing=Packing(EOD, attention, positions)) as loader:
        for batch in loader:
            expected = [by_hand(row) for row in batch.tokens_BS.tolist()]
            check(batch.documents_BS, attention, [documents for documents, _ in expected])
            check(batch.positions_BS, positions, [positions for _, positions in expected])
    with BatchLoader(data, plan) as loader:
        assert all(b.documents_BS is None and b.positions_BS is None for b in loader)


def check(found: Tensor | None, asked: bool, expected: list[list[int]]) -> None:
    assert (found is not None) == asked
    assert found is None or found.tolist() == expected
