"""Kernels of decoding on the CPU, where Triton is installed and asked to interpret its programs:
``TRITON_INTERPRET=1``. On CUDA the same is checked in ``tests/gpu``."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from mtk.kernels import has_triton
from tests.kernels import decode_cases
from tests.kernels.decode_cases import CASES, CUTS, PLAIN, PRODUCTS, TURNS, Heads, Product, Turn
from tests.serving.models import greedy_without_cache, tiny_model
from tests.serving.paged.running import ask, generate_paged
from tests.serving.paged.test_batch import KINDS

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


@pytest.mark.parametrize("turn", [PLAIN, Turn(16, normed=True)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Heads, turn: Turn) -> None:
    decode_cases.check_attention(case, turn, CPU)


@pytest.mark.parametrize("groups", [4, 2])
def test_nan_stays_where_it_is(groups: int) -> None:
    decode_cases.check_nan_stays(groups, CPU)


@pytest.mark.parametrize("queries", [6, 20])
@pytest.mark.parametrize("turn", TURNS, ids=str)
def test_heads(turn: Turn, queries: int) -> None:
    decode_cases.check_heads(turn, queries, CPU)


def test_look() -> None:
    decode_cases.check_look(CPU, torch.float32)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("rows", [2, 17])
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_few_rows(case: Product, rows: int, cut: tuple[int, ...] | None) -> None:
    # The interpreter does not multiply tiles in bf16.
    dtype = torch.float16 if case.dtype == torch.bfloat16 else case.dtype
    decode_cases.check_few_rows(replace(case, dtype=dtype), rows, cut, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate(dtype: torch.dtype) -> None:
    decode_cases.check_gate(CPU, dtype)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "window"])
def test_whole_steps(kind: str, rows: int) -> None:
    """The engine's batch on kernels gives the tokens of the model without a cache."""
    model, prompts = tiny_model(**KINDS[kind]), (tuple(b"Hello world"), tuple(b"x" * 20), (7,))
    outputs, _ = generate_paged(
        model, ask(*prompts, max_tokens=6), rows=rows, kernels=True, ahead=True
    )
    expected = [greedy_without_cache(model, prompt, 6) for prompt in prompts]
    assert [list(output.tokens) for output in outputs] == expected


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_products(case: Product) -> None:
    decode_cases.check_product(case, CPU)
