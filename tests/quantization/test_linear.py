"""Layers that keep their matrix in few bits, and models that have them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtk.errors import ConversionError
from mtk.quantization.formats import format_of
from mtk.quantization.linear import QuantizedLinear, can_join, join, quantize_in_place
from mtk.quantization.packing import pack, unpack
from mtk.quantization.tensor import Kind, QuantizedTensor
from tests.models.sizes import llama_config, small_config, small_model
from tests.quantization.test_formats import GROUP, KINDS, weight

BITS = {"int8": 8, "fp8": 8, "int4": 4}


def layer(kind: Kind, outputs: int = 6, seed: int = 3, bias: bool = True) -> QuantizedLinear:
    q = format_of(kind, GROUP).quantize(weight(outputs, 64, seed), "w")
    return QuantizedLinear.of(q, weight(1, outputs)[0] if bias else None)


@pytest.mark.parametrize("kind", KINDS)
def test_packing_is_lossless_and_small(kind: Kind) -> None:
    q = format_of(kind, GROUP).quantize(weight(), "w")
    packed = pack(q)
    assert packed.nbytes * 8 == q.values_OI.numel() * BITS[kind]
    assert torch.equal(unpack(kind, packed, 2).float(), q.values_OI.float())


def test_order_of_words() -> None:
    """Word j of a group: inputs j, j + g/8, ... from the lowest bits up, plus 8."""
    values = (torch.arange(64).view(1, 64) * 5 % 16 - 8).to(torch.int8)
    words = pack(QuantizedTensor("int4", values, torch.ones(1, 2)))
    for at, word in enumerate(words[0].tolist()):
        group, j = divmod(at, 4)
        for place in range(8):
            value = (word >> (4 * place)) & 15
            assert value - 8 == values[0, group * 32 + place * 4 + j]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_product_is_that_of_the_dequantised_matrix(kind: Kind, dtype: torch.dtype) -> None:
    held = layer(kind)
    q = format_of(kind, GROUP).quantize(weight(), "w")
    x = weight(10, 64, 7).view(2, 5, 64).to(dtype)
    assert held.bias is not None
    held.bias.data = held.bias.data.to(dtype)
    expected = F.linear(x, q.dequantize().to(dtype), held.bias)
    assert torch.equal(held(x), expected)


def test_awqs_factors_multiply_inputs() -> None:
    q = format_of("int4", GROUP).quantize(weight(), "w")
    scaled = QuantizedTensor("int4", q.values_OI, q.scale_OG, torch.rand(64))
    held, x = QuantizedLinear.of(scaled, None), weight(3, 64, 7)
    assert torch.equal(held(x), F.linear(x, scaled.dequantize()))
    assert not can_join([held, held])


@pytest.mark.parametrize("kind", KINDS)
def test_casts_leave_weights_and_scales(kind: Kind) -> None:
    held = layer(kind)
    before = held.quantized.dequantize()
    held = nn.Sequential(held).to(torch.bfloat16)[0]  # type: ignore[assignment]
    assert held.bias is not None and held.bias.dtype == torch.bfloat16
    assert torch.equal(held.quantized.dequantize(), before)
    again = copy.deepcopy(held).half()
    assert torch.equal(again.quantized.dequantize(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_joined_layers_share_memory(kind: Kind) -> None:
    parts = [layer(kind, outputs, seed) for seed, outputs in enumerate((6, 2, 4))]
    x = weight(3, 64, 7)
    expected = torch.cat([part(x) for part in parts], dim=-1)
    assert can_join(parts)
    whole = join(parts)
    torch.testing.assert_close(whole(x), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([part(x) for part in parts], -1), expected)
    homes = {part.packed.untyped_storage().data_ptr() for part in (*parts, whole)}
    assert len(homes) == 1


def test_unlike_layers_are_not_joined() -> None:
    assert not can_join([layer("int8"), layer("fp8")])
    assert not can_join([layer("int8"), layer("int8", bias=False)])
    assert not can_join([layer("int8"), nn.Linear(64, 6)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_quantised_in_place(kind: Kind) -> None:
    """Its layers are small; embedding and output matrix are as before."""
    config = llama_config(hidden_size=64, untie_embeddings_and_output_weights=True)
    model = small_model(config)
    dense = copy.deepcopy(model)
    quantize_in_place(model, kind, GROUP)
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear) and name != "output":
            held = model.get_submodule(name)
            assert isinstance(held, QuantizedLinear)
            module.weight.data = held.quantized.dequantize()
            assert held.packed.nbytes * 32 == module.weight.nbytes * BITS[kind]
    assert type(model.output) is nn.Linear
    x_BS = torch.arange(12).view(2, 6)
    torch.testing.assert_close(model(x_BS), dense(x_BS), rtol=0, atol=0)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConversionError, match="groups of 128"):
        quantize_in_place(small_model(small_config()), "int4")
    with pytest.raises(ConversionError, match="no plain matrix"):
        quantize_in_place(nn.Linear(4, 4), "int8")
