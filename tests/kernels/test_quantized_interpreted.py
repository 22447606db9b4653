"""Kernels of quantised weights on the CPU, as in :mod:`tests.kernels.test_decode_interpreted`."""

from __future__ import annotations

import pytest

from mtk.quantization.tensor import Kind
from tests.kernels import quantized_cases
from tests.kernels.quantized_cases import KINDS, PRODUCTS, ROWS, Product, Rows
from tests.kernels.test_decode_interpreted import CPU, bounds_of_loops, pytestmark

__all__ = ["bounds_of_loops", "pytestmark"]


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products(kind: Kind, case: Product) -> None:
    quantized_cases.check_product(kind, case, CPU)


@pytest.mark.parametrize("case", ROWS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows(kind: Kind, case: Rows) -> None:
    quantized_cases.check_rows(kind, case, CPU)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_written_out(kind: Kind, group: int) -> None:
    quantized_cases.check_written_out(kind, group, CPU)
