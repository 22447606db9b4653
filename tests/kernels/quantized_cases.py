"""Kernels of quantised weights beside plain PyTorch, on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtk.quantization.formats import format_of
from mtk.quantization.linear import QuantizedLinear
from mtk.quantization.packing import typed
from mtk.quantization.tensor import Kind
from tests.kernels import decode_cases

BF16 = torch.bfloat16
KINDS: tuple[Kind, ...] = ("int8", "fp8", "int4")


@dataclass(frozen=True)
class Product(decode_cases.Product):
    """group: of INT4."""

    group: int = 128


PRODUCTS = [
    Product(128, 38),
    Product(1024, 8, normed=True),
    Product(1408, 50, normed=True, biased=True, group=64),
    Product(4224, 6, gated=True, normed=True),
    Product(8320, 4, group=32),
    Product(384, 10, gated=True, biased=True),
    Product(1280, 128, added=True, dtype=BF16),
    Product(1408, 64, normed=True, biased=True, gated=True, added=True, dtype=BF16),
]


@dataclass(frozen=True)
class Rows:
    """A product of several rows."""

    rows: int
    inputs: int
    outputs: int
    biased: bool = False
    dtype: torch.dtype = torch.float32
    group: int = 128


ROWS = [
    Rows(2, 128, 38),
    Rows(16, 384, 70, biased=True),
    # Triton's interpreter multiplies the bits of bf16.
    Rows(17, 640, 34, dtype=torch.float16),
    Rows(64, 128, 32, biased=True),
    Rows(3, 192, 6, group=64),
    Rows(65, 128, 20, biased=True, group=32),
]


def near(dtype: torch.dtype) -> dict[str, float]:
    bound = 2e-5 if dtype == torch.float32 else 2e-2
    return {"rtol": bound, "atol": bound}


def layer(
    kind: Kind, outputs: int, inputs: int, group: int, bias: Tensor | None, device: torch.device
) -> QuantizedLinear:
    """A random one. Neighbouring scales are far from each other."""
    weight = torch.randn(outputs, inputs) / inputs**0.5
    weight *= torch.rand(outputs, 1) * 4
    weight.view(outputs, -1, min(group, inputs)).mul_(torch.rand(1, inputs // group, 1) + 0.1)
    return QuantizedLinear.of(format_of(kind, group).quantize(weight.to(device), "w"), bias)


def check_product(kind: Kind, case: Product, device: torch.device) -> None:
    from mtk.kernels.quantized_gemv import quantized_gemv

    torch.manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, case.dtype)

    rows = case.outputs * (2 if case.gated else 1)
    x, bias = made(1, case.inputs), made(rows)
    norm, residual = made(case.inputs), made(1, case.outputs)
    held = layer(kind, rows, case.inputs, case.group, None, device)
    exact = x.double()
    if case.normed:
        exact = F.rms_norm(exact, (case.inputs,), norm.double(), 1e-3)
    weight = held.quantized.dequantize().double()
    exact = F.linear(exact, weight, bias.double() if case.biased else None)
    if case.gated:
        gate, up = exact.chunk(2, dim=-1)
        exact = F.silu(gate) * up
    if case.added:
        exact = exact + residual.double()
    found = quantized_gemv(
        x,
        typed(kind, held.packed),
        held.scale,
        bias_F=bias if case.biased else None,
        norm=(norm, 1e-3) if case.normed else None,
        residual_1F=residual if case.added else None,
        gated=case.gated,
    )
    torch.testing.assert_close(found.double(), exact, **near(case.dtype))


def check_rows(kind: Kind, case: Rows, device: torch.device) -> None:
    """Whatever the number of rows, through the layer."""
    from mtk.quantization.kernel_product import kernel_product

    torch.manual_seed(0)
    bias = torch.randn(case.outputs).to(device, case.dtype) if case.biased else None
    held = layer(kind, case.outputs, case.inputs, case.group, bias, device)
    x = torch.randn(case.rows, case.inputs).to(device, case.dtype)
    exact = F.linear(
        x.double(), held.quantized.dequantize().double(), None if bias is None else bias.double()
    )
    found = kernel_product(held, x)
    assert found.dtype == case.dtype and found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, **near(case.dtype))


def check_written_out(kind: Kind, group: int, device: torch.device) -> None:
    """Bit for bit the matrix that is multiplied with elsewhere (Triton's interpreter cuts numbers
    off where they are to be rounded to bf16)."""
    from mtk.kernels.quantized_rows import written_out

    held = layer(kind, 10, 4352, group, None, device)
    weight = typed(kind, held.packed)
    for dtype in (torch.float32, BF16):
        found = written_out(weight, held.scale, 4352, dtype)
        expected = held.quantized.dequantize().to(dtype)
        cut = 2.0**-7 if dtype == BF16 and device.type == "cpu" else 0.0
        torch.testing.assert_close(found, expected, rtol=cut, atol=0)
