"""Quantised weights on CUDA: kernels, steps of the engine, and the tokens of the CPU."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from mtk.quantization.linear import dequantized_product, quantize_in_place
from mtk.quantization.tensor import Kind
from serving.decode_speed import measure_decode
from tests.kernels import quantized_cases
from tests.kernels.quantized_cases import BF16, KINDS, PRODUCTS, ROWS, Product, Rows
from tests.models.sizes import llama_config, small_model
from tests.serving.models import LLAMA_LIKE, greedy_without_cache, tiny_model
from tests.serving.paged.running import ask, drain, make_batch, sequences
from tests.serving.paged.test_batch import PROMPTS

CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products(kind: Kind, case: Product, dtype: torch.dtype) -> None:
    quantized_cases.check_product(kind, replace(case, dtype=dtype), CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("case", ROWS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows(kind: Kind, case: Rows, dtype: torch.dtype) -> None:
    quantized_cases.check_rows(kind, replace(case, dtype=dtype), CUDA)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_of_real_models(kind: Kind) -> None:
    for case in (Product(4096, 1024, normed=True), Product(14336, 256, added=True)):
        quantized_cases.check_product(kind, replace(case, dtype=BF16), CUDA)
    for rows in (2, 31, 64, 200):
        quantized_cases.check_rows(kind, Rows(rows, 4096, 6144, dtype=BF16), CUDA)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_written_out(kind: Kind, group: int) -> None:
    quantized_cases.check_written_out(kind, group, CUDA)


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "graphs"])
@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_equal_the_cpu(kind: Kind, kernels: bool, graphs: bool) -> None:
    model, said = tiny_model(**LLAMA_LIKE, hidden_size=64, ffn_hidden_size=128), []
    quantize_in_place(model, kind, 32)
    expected = [greedy_without_cache(model, prompt, 40) for prompt in PROMPTS]
    for rows in (1, 4):
        batch = make_batch(
            copy.deepcopy(model).to(CUDA), rows=rows, blocks=40, ahead=True, graphs=graphs,
            kernels=kernels, report=said.append,
        )  # fmt: skip
        made = sequences(batch, ask(*PROMPTS, max_tokens=40))
        for sequence in made:
            batch.add(sequence)
        drain(batch)
        assert [sequence.tokens for sequence in made] == expected
        if graphs:
            assert batch.runner.graphs is not None and batch.runner.graphs.count and not said


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_a_paged_cache_multiplies_too(kind: Kind) -> None:
    model = tiny_model(**LLAMA_LIKE, hidden_size=128, ffn_hidden_size=256)
    quantize_in_place(model, kind).to(CUDA)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if hasattr(module, "product") and hasattr(module, "packed"):
            module.product = dequantized_product
    for length in (1, 9, 70):
        x_BS = torch.arange(length, device=CUDA).view(1, length)
        torch.testing.assert_close(model(x_BS), plain(x_BS), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_speed_is_measured(kind: Kind) -> None:
    # Inputs in whole groups of INT4.
    sizes = {"hidden_size": 128, "ffn_hidden_size": 384}
    config = llama_config(vocab_size=257, max_position_embeddings=256, **sizes)
    model = small_model(config).to(CUDA).bfloat16()
    dense = measure_decode(copy.deepcopy(model), 1, 32, 100)
    found = measure_decode(quantize_in_place(model, kind), 1, 32, 100)
    assert found.graphs > 0 and found.weight_bytes < dense.weight_bytes
