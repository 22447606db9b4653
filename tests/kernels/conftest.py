"""Weights lie as kernels read them, row by row, on the CPU too, where kernels are interpreted."""

from __future__ import annotations

import pytest
from torch import Tensor

from serving.paged import columns, layers


@pytest.fixture(autouse=True)
def by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(weight: Tensor) -> bool:
        return False

    monkeypatch.setattr(columns, "wants_columns", never)
    monkeypatch.setattr(layers, "wants_columns", never)
