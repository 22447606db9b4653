"""FP8 and INT4: rounding, and how the dialects spell them, without a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtk.errors import ConversionError
from mtk.quantization.dialects import NAMES, dialect_of, recognise
from mtk.quantization.formats import format_of
from mtk.quantization.tensor import Kind, QuantizedTensor

KINDS: tuple[Kind, ...] = ("int8", "fp8", "int4")
GROUP = 32


def weight(outputs: int = 6, inputs: int = 64, seed: int = 3) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_to_the_nearest(kind: Kind) -> None:
    """No number that the format has lies nearer than the one that was taken."""
    w_OI, rounding = weight(), format_of(kind, GROUP)
    q = rounding.quantize(w_OI, "w")
    codes = torch.arange(256, dtype=torch.uint8)
    all_of = {
        "int8": torch.arange(-127.0, 128),
        "fp8": codes.view(torch.float8_e4m3fn).float(),
        "int4": torch.arange(-8.0, 8),
    }[kind]
    levels = all_of[all_of.isfinite()]
    exact = w_OI / q.scale_OG.repeat_interleave(q.group, dim=1)
    nearest = (exact[..., None] - levels).abs().amin(-1)
    torch.testing.assert_close((exact - q.values_OI.float()).abs(), nearest, rtol=1e-4, atol=1e-6)
    error = (q.dequantize() - w_OI).abs()
    assert (error <= rounding.bound(w_OI)).all()
    assert (error > rounding.bound(w_OI) / 4).any()


@pytest.mark.parametrize(("kind", "low", "high"), [("fp8", 0.024, 0.028), ("int4", 0.105, 0.118)])
def test_gaussian_error_is_the_known_one(kind: Kind, low: float, high: float) -> None:
    """2.62 % and, in groups of 128, 11.2 % of a Gaussian weight."""
    w_OI = weight(512, 1024, 1)
    error = format_of(kind).quantize(w_OI, "w").dequantize() - w_OI
    assert low < error.norm() / w_OI.norm() < high


@pytest.mark.parametrize("kind", KINDS)
def test_edges(kind: Kind) -> None:
    rows = torch.zeros(4, GROUP)
    rows[1], rows[2, 3] = 1e-45, -2.0
    rows[3, :2] = torch.tensor([3e38, -3e38])
    q = format_of(kind, GROUP).quantize(rows, "w")
    assert q.dequantize().isfinite().all() and not q.values_OI[0].float().any()
    assert q.dequantize()[2, 3] == pytest.approx(-2.0, rel=0.07)
    with pytest.raises(ConversionError, match=r"blocks\.q holds values that are not finite"):
        format_of(kind, 2).quantize(torch.tensor([[1.0, float("nan")]] * 2), "blocks.q")


@pytest.mark.parametrize("shape", [(6, 48), (5, 64)])
def test_int4_needs_whole_groups_and_pairs(shape: tuple[int, int]) -> None:
    with pytest.raises(ConversionError, match=r"q_proj is \[.*--group-size"):
        format_of("int4", GROUP).quantize(torch.zeros(shape), "q_proj")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_dialects_are_lossless(name: str, kind: Kind) -> None:
    q, dialect = format_of(kind, GROUP).quantize(weight(), "w"), dialect_of(name, kind, GROUP)
    parts = dialect.encode(q)
    assert tuple(parts) == dialect.suffixes
    back = dialect.decode(parts)
    assert torch.equal(back.values_OI.float(), q.values_OI.float())
    assert torch.equal(back.scale_OG, q.scale_OG) and back.kind == kind
    found = recognise(dialect.config(["lm_head"]))
    assert (found.name, found.kind) == (name, kind)


def test_golden_bytes_of_int4() -> None:
    """ModelOpt: rows 2r (low) and 2r + 1 in two's complement; compressed-tensors: eight inputs a
    word, the first lowest, plus 8."""
    rows = torch.tensor([[-8, -1, 0, 1, 7, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, -8]], dtype=torch.int8)
    q = QuantizedTensor("int4", rows, torch.ones(2, 2) / 4)
    pairs = dialect_of("modelopt", "int4").encode(q)
    assert pairs["weight"].tolist() == [[0x18, 0x2F, 0x30, 0x41, 0x57, 0x62, 0x73, 0x84]]
    assert pairs["weight_scale"].tolist() == [[0.25, 0.25]] * 2
    words = dialect_of("compressed-tensors", "int4").encode(q)
    expected = [[0xCBAF9870 - 2**32], [0x0FEDCBA9]]
    assert words["weight_packed"].tolist() == expected
    assert words["weight_shape"].tolist() == [2, 8]


def test_golden_bytes_of_fp8() -> None:
    """448 is 0x7E, 1 is 0x38, -0.5 is 0xB0."""
    q = format_of("fp8").quantize(torch.tensor([[448.0, 1.0, -0.5]]), "w")
    for name, shape in (("modelopt", [1]), ("compressed-tensors", [1, 1])):
        parts = dialect_of(name, "fp8").encode(q)
        assert parts["weight"].view(torch.uint8).tolist() == [[0x7E, 0x38, 0xB0]]
        assert list(parts["weight_scale"].shape) == shape and parts["weight_scale"].item() == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4)])
def test_words_are_those_of_the_library(kind: Kind, bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    q = format_of(kind, GROUP).quantize(weight(), "w")
    own = dialect_of("compressed-tensors", kind, GROUP).encode(q)
    assert torch.equal(own["weight_packed"], helpers.pack_to_int32(q.values_OI, bits))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "bits", "type_"), [("int4", 4, "int"), ("fp8", 8, "float")])
def test_scales_are_those_of_the_library(kind: Kind, bits: int, type_: str) -> None:
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    arguments = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs(
        num_bits=bits, type=type_, symmetric=True
    )
    q, w_OI = format_of(kind, GROUP).quantize(weight(), "w"), weight()
    grouped = w_OI.view(6, -1, q.group)
    theirs, _ = utils.calculate_qparams(grouped.amin(2), grouped.amax(2), arguments)
    torch.testing.assert_close(q.scale_OG, theirs.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "config", "scale"),
    [
        ("modelopt", {"quant_algo": "FP8"}, torch.tensor(0.5)),
        ("compressed-tensors", None, torch.tensor([0.5])),
    ],
)
def test_one_scale_for_all(name: str, config: dict[str, str] | None, scale: Tensor) -> None:
    """FP8 with a scale for the whole matrix, and one for activations, which do not count here."""
    found = config or dialect_of(name, "fp8").config([])
    if config is None:
        found["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"  # type: ignore[index]
    dialect = recognise({"quant_method": name, **found})
    values = weight().to(torch.float8_e4m3fn)
    parts = {"weight": values, "weight_scale": scale, "input_scale": torch.tensor(2.0)}
    assert torch.equal(dialect.decode(parts).dequantize(), values.float() * 0.5)


def test_awqs_factors_count() -> None:
    dialect = dialect_of("modelopt", "int4", GROUP)
    q = format_of("int4", GROUP).quantize(weight(), "w")
    factors = torch.rand(64, dtype=torch.float32).bfloat16()
    found = dialect.decode({**dialect.encode(q), "pre_quant_scale": factors})
    assert torch.equal(found.dequantize(), q.dequantize() * factors.float())


@pytest.mark.parametrize(
    ("kind", "name", "changes", "message"),
    [
        ("int8", "modelopt", {"weight_scale": torch.ones(3)}, "weight_scale is"),
        ("fp8", "modelopt", {"weight_scale": torch.ones(3)}, "weight_scale is"),
        ("fp8", "compressed-tensors", {"weight_scale": torch.ones(6)}, "weight_scale is"),
        ("int4", "modelopt", {"weight": torch.ones(3, 64)}, "not uint8"),
        ("int4", "modelopt", {"weight_scale": torch.ones(5, 2)}, "INT4 weight needs"),
        ("int4", "modelopt", {"weight_scale": torch.ones(6, 5)}, "INT4 weight needs"),
        ("int4", "modelopt", {"pre_quant_scale": torch.ones(6)}, "factors of"),
        ("int4", "compressed-tensors", {"weight_shape": torch.tensor([6, 40])}, "weight_shape"),
    ],
)
def test_parts_that_do_not_fit(
    kind: Kind, name: str, changes: dict[str, Tensor], message: str
) -> None:
    dialect = dialect_of(name, kind, GROUP)
    parts = dialect.encode(format_of(kind, GROUP).quantize(weight(), "w"))
    with pytest.raises(ConversionError, match=message):
        dialect.decode({**parts, **changes})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
        (
            {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "has_zero_point": True},
            "zero points",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
            "keys and values",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "0 config_groups"),
    ],
)
def test_what_is_not_read_is_named(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        recognise(config)


@pytest.mark.parametrize(
    ("key", "value"), [("symmetric", False), ("strategy", "block"), ("actorder", "group")]
)
def test_other_schemes_are_named(key: str, value: object) -> None:
    config = dialect_of("compressed-tensors", "int4").config([])
    config["config_groups"]["group_0"]["weights"][key] = value
    with pytest.raises(ConversionError, match=f"int4: .*{key}"):
        recognise(config)
