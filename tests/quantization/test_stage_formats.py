"""mtk quantize in FP8 and INT4, from a directory to what is served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtk.artifacts import Artifact
from mtk.config import make
from mtk.config.quantize import QuantizeConfig
from mtk.convert.open_model import open_model
from mtk.errors import ConfigError, ConversionError, GateError
from mtk.models.gpt import GPT
from mtk.quantization import directory
from mtk.quantization.dialects import NAMES
from mtk.quantization.formats import Format
from mtk.quantization.linear import QuantizedLinear
from mtk.quantization.tensor import QuantizedTensor
from serving.open_served import open_served
from stages.quantize import run
from tests.convert.models import TEXT, llama, neox, quiet, save_native
from tests.serving.paged.running import ask, generate_paged

FORMATS = {"int8_wo": 8, "fp8": 8, "int4_wo": 4}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    sizes = {"hidden_size": 64, "ffn_hidden_size": 128, "max_position_embeddings": 96}
    save_native(folder / "llama", llama(**sizes, add_bias_linear=True))
    save_native(folder / "neox", neox(**sizes))
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def quantized(home: Path, save: Path, model: str = "llama", **changes: Any) -> Artifact:
    values: dict[str, Any] = {
        "load": str(home / model),
        "save": str(save),
        "valid_data": str(home / "text.txt"),
        "dialect": "both",
        "group_size": 32,
        # Weights are random: there is nothing to lose.
        "max_perplexity_increase": 1e6,
    }
    return run(make(QuantizeConfig, **(values | changes)), quiet())


@pytest.fixture(scope="module")
def made(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The llama in each format and both dialects."""
    folder = tmp_path_factory.mktemp("made")
    return {name: quantized(home, folder / name, format=name).path for name in FORMATS}


def weight_bytes(model: GPT) -> int:
    """Of all layers."""
    return sum(parameter.nbytes for parameter in model.layers.parameters())


@pytest.mark.parametrize("format_", FORMATS)
def test_both_dialects_are_one_model(format_: str, made: dict[str, Path], home: Path) -> None:
    x_BS = torch.arange(40).view(2, 20)
    logits = [open_model(made[format_] / name).model(x_BS) for name in NAMES]
    assert torch.equal(logits[0], logits[1])
    full = open_model(home / "llama").model(x_BS)
    assert 0 < (logits[0] - full).norm() / full.norm() < {"int8_wo": 0.05}.get(format_, 0.5)
    gate = json.loads((made[format_] / NAMES[0] / "gate.json").read_text())
    assert gate["parity"]["passed"] and gate["parity"]["stored_dtype"] == format_.split("_")[0]


def test_files_say_what_they_are(made: dict[str, Path]) -> None:
    algorithms = {"fp8": "FP8_PER_CHANNEL_PER_TOKEN", "int4_wo": "W4A16_AWQ"}
    for format_, algo in algorithms.items():
        found = json.loads((made[format_] / "modelopt" / "hf_quant_config.json").read_text())
        assert found["quantization"]["quant_algo"] == algo
        for name in NAMES:
            config = json.loads((made[format_] / name / "config.json").read_text())
            assert config["dtype"] == "float32"
    assert found["quantization"]["group_size"] == 32
    stored = load_file(made["int4_wo"] / "modelopt" / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == torch.uint8
    assert list(stored["model.layers.0.mlp.down_proj.weight"].shape) == [32, 128]
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["strategy"], weights["group_size"]) == (4, "group", 32)


@pytest.mark.parametrize("dialect", NAMES)
@pytest.mark.parametrize("format_", FORMATS)
def test_what_is_served_is_small(format_: str, dialect: str, made: dict[str, Path]) -> None:
    path = str(made[format_] / dialect)
    packed = open_served(path, dtype=torch.float32, device="cpu").model
    dense = open_model(path).model
    matrices = [m for m in packed.modules() if isinstance(m, QuantizedLinear)]
    assert len(matrices) == 2 * 7
    values = sum(m.in_features * m.out_features for m in matrices)
    scales = sum(m.scale.numel() for m in matrices)
    saved = 4 * values - values * FORMATS[format_] // 8 - 4 * scales
    assert weight_bytes(dense) - weight_bytes(packed) == saved
    assert weight_bytes(packed) < weight_bytes(dense) * (0.4 if FORMATS[format_] == 8 else 0.35)
    x_BS = torch.arange(40).view(2, 20)
    assert torch.equal(packed(x_BS), dense(x_BS))


@pytest.mark.parametrize("format_", FORMATS)
def test_the_engine_answers_as_the_dense_model(format_: str, made: dict[str, Path]) -> None:
    path = str(made[format_])
    prompts = (tuple(range(3, 20)), (7,), (44, 45, 46))
    request = ask(*prompts, max_tokens=12)
    answers = []
    for packed in (False, True):
        model = open_model(path, packed=packed).model
        outputs, batch = generate_paged(model, request, ahead=True)
        answers.append([list(output.tokens) for output in outputs])
    assert answers[0] == answers[1] and len(answers[0][0]) == 12
    for block in batch.runner.paged.blocks:
        assert block.attention is not None
        stacked = block.attention.stacked
        assert type(stacked).__name__ == "QuantizedStack"


@pytest.mark.parametrize("format_", FORMATS)
def test_split_matrices_stay_quantised(format_: str, home: Path, tmp_path: Path) -> None:
    """GPT-NeoX keeps query, key and value in one matrix, head by head."""
    path = quantized(home, tmp_path / "q", "neox", format=format_).path
    packed = open_model(path, packed=True).model
    assert sum(isinstance(m, QuantizedLinear) for m in packed.modules()) == 2 * 6
    x_BS = torch.arange(40).view(2, 20)
    assert torch.equal(packed(x_BS), open_model(path).model(x_BS))


@pytest.mark.parametrize("format_", ["fp8", "int4_wo"])
def test_wrong_weights_are_refused(
    format_: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault: a weight is off by two levels."""

    def wrong(tensors: Any, name: str, rounding: Format) -> QuantizedTensor:
        q = rounding.quantize(tensors[name], name)
        values_OI = q.values_OI.float()
        values_OI[0, 0] = values_OI[0, 0] - 2 if values_OI[0, 0] > 0 else values_OI[0, 0] + 2
        return QuantizedTensor(q.kind, values_OI.to(q.values_OI.dtype), q.scale_OG)

    monkeypatch.setattr(directory, "rounded", wrong)
    with pytest.raises(GateError, match=r"proj\.weight .* not its original rounded to (FP8|INT4)"):
        quantized(home, tmp_path / "q", format=format_)
    assert list(tmp_path.iterdir()) == []


def test_groups_that_do_not_fit(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"whole groups of 128.*--group-size"):
        quantized(home, tmp_path / "q", format="int4_wo", group_size=128)
    with pytest.raises(ConfigError, match="Nearest: 64"):
        quantized(home, tmp_path / "q", format="int4_wo", group_size=72)
    assert list(tmp_path.iterdir()) == []


def test_a_lost_scale_is_named(made: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    shutil.copytree(made["int4_wo"] / "modelopt", folder)
    stored = load_file(folder / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight_scale"
    del stored[lost]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    for packed in (False, True):
        with pytest.raises(ConversionError, match=f"uint8, but there is no {lost}"):
            open_model(folder, packed=packed)


def test_a_matrix_of_other_sizes_is_named(made: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    shutil.copytree(made["fp8"] / "modelopt", folder)
    stored = load_file(folder / "model.safetensors")
    for suffix in ("weight", "weight_scale"):
        name = f"model.layers.1.mlp.up_proj.{suffix}"
        stored[name] = stored[name][:-2].contiguous()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"up_proj\.weight.*asks for \[128, 64\]"):
        open_model(folder, packed=True)
