"""The product of a quantised layer with the kernels of :mod:`mtk.kernels`. Needs Triton."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mtk.kernels.quantized_gemv import GROUPS, quantized_gemv
from mtk.kernels.quantized_rows import GROUP, MOST_ROWS, quantized_rows, written_out
from mtk.quantization.linear import QuantizedLinear, dequantized_product
from mtk.quantization.packing import typed


def has_kernels(linear: QuantizedLinear) -> bool:
    """Whether kernels know the layer's groups."""
    return linear.kind != "int4" or linear.in_features // linear.groups in GROUPS


def kernel_product(linear: QuantizedLinear, x: Tensor) -> Tensor:
    """As :func:`mtk.quantization.linear.dequantized_product`: of one row, of a few and of many."""
    if not has_kernels(linear):
        return dequantized_product(linear, x)
    if linear.input_scale is not None:
        x = x * linear.input_scale.to(x.dtype)
    x_ME = x.reshape(-1, linear.in_features).contiguous()
    rows, weight = len(x_ME), typed(linear.kind, linear.packed)
    group = linear.in_features // linear.groups
    if rows == 1:
        y_MF = quantized_gemv(x_ME, weight, linear.scale, bias_F=linear.bias)
    elif 1 < rows <= MOST_ROWS and (linear.kind != "int4" or group == GROUP):
        y_MF = quantized_rows(x_ME, weight, linear.scale, linear.bias)
    else:
        whole = written_out(weight, linear.scale, linear.in_features, x.dtype)
        y_MF = F.linear(x_ME, whole, linear.bias)
    return y_MF.view(*x.shape[:-1], linear.out_features)
