"""Kernels of decoding on the CPU, where Triton is installed and asked to interpret its programs:
``TRITON_INTERPRET=1``. On CUDA the same is checked in ``tests/gpu``."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from mtk.kernels import has_triton
from tests.kernels import decode_cases
from tests.kernels.decode_cases import CASES, PRODUCTS, TURNS, Heads, Product, Turn

pytestmark = pytest.mark.skipif(
    not has_triton() or os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton is not installed, or is not to interpret (TRITON_INTERPRET=1)",
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def bounds_of_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter makes numbers of arrays in a way that NumPy 2.4 no longer knows."""
    from triton.runtime import interpreter

    real = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        real(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Heads) -> None:
    decode_cases.check_attention(case, CPU)


def test_nan_stays_where_it_is() -> None:
    decode_cases.check_nan_stays(CPU)


@pytest.mark.parametrize("turn", TURNS, ids=str)
def test_rotation(turn: Turn) -> None:
    decode_cases.check_rotation(turn, CPU)


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_products(case: Product) -> None:
    decode_cases.check_product(case, CPU)
