"""Kernels of quantised weights on the CPU, as in :mod:`tests.kernels.test_decode_interpreted`."""

from __future__ import annotations

import pytest

from mtk.quantization.linear import quantize_in_place
from mtk.quantization.tensor import Kind
from serving.paged.layers import GatedMLP
from serving.paged.quantized import QuantizedStack
from tests.kernels import quantized_cases
from tests.kernels.quantized_cases import KINDS, PRODUCTS, ROWS, Product, Rows
from tests.kernels.test_decode_interpreted import CPU, bounds_of_loops, pytestmark
from tests.serving.models import LLAMA_LIKE, greedy_without_cache, tiny_model
from tests.serving.paged.running import ask, generate_paged

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


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_steps(kind: Kind, rows: int) -> None:
    """The engine's batch on kernels gives the tokens of the quantised model without a cache."""
    model = quantize_in_place(tiny_model(**LLAMA_LIKE, ffn_hidden_size=64), kind, 32)
    prompts = (tuple(b"Hello"), (7,))
    expected = [greedy_without_cache(model, prompt, 3) for prompt in prompts]
    outputs, batch = generate_paged(
        model, ask(*prompts, max_tokens=3), rows=rows, kernels=True, ahead=True
    )
    assert [list(output.tokens) for output in outputs] == expected
    for block in batch.runner.paged.blocks:
        assert isinstance(block.mlp, GatedMLP) and isinstance(block.mlp.stacked, QuantizedStack)
        product = block.mlp.stacked.linear.product
        assert product is not None and product.__name__ == "kernel_product"
