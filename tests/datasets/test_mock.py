"""The generated tokens against the golden values of the reference."""

from __future__ import annotations

import numpy as np
import pytest

from mtk.data.mock import MockSource


def test_golden_lengths() -> None:
    source = MockSource(50000, 49999)
    assert source.sizes[:8].tolist() == [3484, 2609, 2094, 1105, 1261, 168, 309, 68]
    assert int(source.sizes.sum()) == 204637097
    assert len(source) == 100000
    assert source.sizes.dtype == np.int32
    assert source.document_indices[-1] == 100000


def test_parts_agree_with_the_whole() -> None:
    source = MockSource(100, 7)
    whole = source.get(7)
    assert whole.tolist() == [*((i + 1) % 100 for i in range(67)), 7]
    for offset, length in ((0, 68), (3, 10), (60, 8), (67, 1), (68, 0), (5, None)):
        stop = None if length is None else offset + length
        assert source.get(7, offset, length).tolist() == whole[offset:stop].tolist()


def test_eod_outside_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        MockSource(100, 100)
