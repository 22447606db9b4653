"""INT8 values and scales, and how the two dialects spell them, without a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtk.errors import ConversionError
from mtk.quantization.dialects import NAMES, dialect_of, recognise
from mtk.quantization.int8 import quantize
from mtk.quantization.tensor import QuantizedTensor


def weight(outputs: int = 6, inputs: int = 10) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(3))


def test_rounding_is_to_the_nearest_level_of_each_row() -> None:
    w_OI = weight()
    q = quantize(w_OI, "w")
    assert torch.equal(q.scale_OG[:, 0], w_OI.abs().amax(dim=1) / 127)
    error = (q.dequantize() - w_OI).abs()
    assert (error <= q.scale_OG * 0.5000001).all()
    assert q.values_OI.abs().amax(dim=1).tolist() == [127] * 6


def test_gaussian_error_is_the_known_one() -> None:
    """0.8 % relative Frobenius error of a Gaussian weight under max calibration."""
    w_OI = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1))
    relative = (quantize(w_OI, "w").dequantize() - w_OI).norm() / w_OI.norm()
    assert 0.006 < relative < 0.0095


def test_edges() -> None:
    rows = torch.stack([torch.zeros(4), torch.full((4,), 1e-45), torch.tensor([1.0, -2, 0, 2])])
    q = quantize(rows, "w")
    assert q.dequantize().isfinite().all() and q.values_OI[0].tolist() == [0] * 4
    assert q.dequantize()[2].tolist() == pytest.approx([64 / 63.5, -2, 0, 2])
    with pytest.raises(ConversionError, match=r"blocks\.q holds values that are not finite"):
        quantize(torch.tensor([[1.0, float("nan")]]), "blocks.q")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inputs", [4, 10, 11, 12, 13])
def test_dialects_are_lossless(name: str, inputs: int) -> None:
    q, dialect = quantize(weight(5, inputs), "w"), dialect_of(name, "int8")
    parts = dialect.encode(q)
    assert tuple(parts) == dialect.suffixes
    back = dialect.decode(parts)
    assert torch.equal(back.values_OI, q.values_OI) and torch.equal(back.scale_OG, q.scale_OG)
    found = recognise(dialect.config(["lm_head"]))
    assert (found.name, found.kind) == (name, "int8")


def test_golden_bytes() -> None:
    """Byte k of a word is input 4w + k plus 128; a row ends in zero bytes plus 128."""
    values = torch.tensor([[-127, -1, 0, 1, 127]], dtype=torch.int8)
    q = QuantizedTensor("int8", values, torch.tensor([[0.5]]))
    packed = dialect_of("compressed-tensors", "int8").encode(q)
    assert packed["weight_packed"].view(torch.uint8).tolist() == [
        [1, 127, 128, 129, 255, 128, 128, 128]
    ]
    assert packed["weight_scale"].tolist() == [[0.5]]
    assert packed["weight_shape"].tolist() == [1, 5]
    plain = dialect_of("modelopt", "int8").encode(q)
    assert plain["weight"].tolist() == values.tolist() and plain["weight_scale"].tolist() == [0.5]


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(3, 1)),
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 2)),
        (torch.zeros(2, 3), torch.zeros(2, 1)),
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 1, dtype=torch.float16)),
        (torch.zeros(2, dtype=torch.int8), torch.zeros(2, 1)),
    ],
)
def test_bad_forms(values: Tensor, scale: Tensor) -> None:
    with pytest.raises(ConversionError, match="INT8 weight needs"):
        QuantizedTensor("int8", values, scale)


def test_packed_shapes_are_checked() -> None:
    dialect = dialect_of("compressed-tensors", "int8")
    parts = dialect.encode(quantize(weight(), "w"))
    parts["weight_shape"] = torch.tensor([6, 40])
    with pytest.raises(ConversionError, match="weight_shape says"):
        dialect.decode(parts)
