"""Shared by all tests: one torch thread a process, so that workers do not fight for cores; what
takes long comes first."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

# Few tests, but of many processes: begun first, so that no worker is left alone with them.
FIRST = ("verification", "parallel", "launch", "benchmarks", "training")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name not in FIRST)
