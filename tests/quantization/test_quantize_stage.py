"""mtk quantize: files of both dialects, the gate, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mtk.artifacts import Artifact, verify_lineage
from mtk.checkpoint.save import CheckpointContent
from mtk.config import make
from mtk.config.quantize import QuantizeConfig
from mtk.convert.lazy import Tensors
from mtk.convert.open_model import open_model
from mtk.data.indexed_dataset import IndexedDatasetWriter
from mtk.errors import ConfigError, ConversionError, DataError, GateError, MtkError
from mtk.models.gpt import GPT
from mtk.quantization import directory, int8
from mtk.quantization.dialects import NAMES
from mtk.quantization.formats import Format
from mtk.quantization.int8 import quantize
from mtk.quantization.tensor import QuantizedTensor
from serving.app import create_app
from serving.open_served import open_served
from serving.settings import ServerSettings
from serving.torch_engine import TorchEngine
from stages.convert import run as convert
from stages.quantize import run
from tests.checkpoint.publish import save_checkpoint
from tests.convert.models import (
    TEXT,
    convert_config,
    gpt2_config,
    llama,
    quiet,
    save_native,
    small_tokenizer,
)
from tests.models.sizes import small_model

GENEROUS = 5.0  # percent
LINEARS = 7


def trained() -> GPT:
    """A model that knows TEXT well, so that a loss of precision shows."""
    config = llama()
    model = small_model(config).train()
    ids = small_tokenizer().encode(TEXT * 3)[:-1]
    rows = torch.tensor([ids[k : k + 25] for k in range(0, len(ids) - 25, 5)])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        logits = model(rows[:, :-1]).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native checkpoint, its Hugging Face export and a text."""
    folder = tmp_path_factory.mktemp("quantize")
    model = trained()
    content = CheckpointContent(model.config, dict(model.named_parameters()))
    small_tokenizer().save(folder / "tokenizer")
    content = replace(content, tokenizer_folder=folder / "tokenizer")
    save_checkpoint(
        folder / "native", content, stage="pretrain", config=model.config, inputs=[], metrics={}
    )
    convert(convert_config(folder / "native", folder / "hf"), quiet())
    (folder / "text.txt").write_text(TEXT * 3, encoding="utf-8")
    return folder


def quantized(home: Path, save: Path, **changes: Any) -> Artifact:
    values: dict[str, Any] = {
        "load": str(home / "hf"),
        "save": str(save),
        "valid_data": str(home / "text.txt"),
        "max_perplexity_increase": GENEROUS,
    }
    return run(make(QuantizeConfig, **(values | changes)), quiet())


def test_modelopt_files(home: Path, tmp_path: Path) -> None:
    artifact = quantized(home, tmp_path / "q")
    stored = load_file(artifact.path / "model.safetensors")
    original = load_file(home / "hf" / "model.safetensors")
    scales = [name for name in stored if name.endswith("weight_scale")]
    assert len(scales) == 2 * LINEARS
    for name, tensor in original.items():
        if f"{name}_scale" in stored:
            q = quantize(tensor, name)
            assert stored[name].dtype == torch.int8
            assert torch.equal(stored[name], q.values_OI)
            assert torch.equal(stored[f"{name}_scale"], q.scale_OG[:, 0])
        else:
            assert torch.equal(stored[name], tensor)
    assert stored["model.embed_tokens.weight"].dtype == torch.float32
    inline = json.loads((artifact.path / "config.json").read_text())["quantization_config"]
    assert inline["quant_method"] == "modelopt" and inline["quant_algo"] == "W8A16"
    assert inline["ignore"] == ["lm_head", "model.embed_tokens"]
    extra = json.loads((artifact.path / "hf_quant_config.json").read_text())["quantization"]
    assert extra == {
        "quant_algo": "W8A16",
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head", "model.embed_tokens"],
    }


@pytest.mark.parametrize("source", ["native", "hf"])
def test_both_dialects_are_one_model(source: str, home: Path, tmp_path: Path) -> None:
    artifact = quantized(home, tmp_path / "q", dialect="both", load=str(home / source))
    x_BS = torch.arange(40).view(2, 20)
    logits = [open_model(artifact.path / name).model(x_BS) for name in NAMES]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(open_model(artifact.path).model(x_BS), logits[0])
    full = open_model(home / "native").model(x_BS)
    assert 0 < (logits[0] - full).norm() / full.norm() < 0.05
    opened = open_model(artifact.path / "compressed-tensors")
    assert opened.artifact is not None and opened.artifact.digest == artifact.digest
    assert opened.kind == "quantized"
    assert opened.tokenizer.fingerprint == small_tokenizer().fingerprint


@pytest.mark.parametrize("part", ["", *NAMES])
def test_both_dialects_are_served(part: str, home: Path, tmp_path: Path) -> None:
    """Over HTTP: the folder of both and each dialect answer alike, with the gate's lineage."""
    artifact = quantized(home, tmp_path / "q", dialect="both")
    served = open_served(str(artifact.path / part), dtype=torch.float32, device="cpu")
    assert served.lineage is not None and served.lineage["digest"] == artifact.digest
    engine = TorchEngine(served.model, served.tokenizer, context=24)
    try:
        client = create_app(engine, ServerSettings(model="q", lineage=served.lineage)).test_client()
        body = {"prompts": ["one"], "tokens_to_generate": 4, "top_k": 1, "logprobs": True}
        response = client.put("/api", json=body)
    finally:
        engine.close(10)
    assert response.status_code == 200, response.json
    ids = served.tokenizer.encode("one")
    with torch.inference_mode():
        for _ in range(4):
            ids.append(int(served.model(torch.tensor([ids]))[0, -1].argmax()))
        logs_SV = served.model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    assert response.json["text"] == [served.tokenizer.decode(ids)]
    expected = [float(logs_SV[i, token]) for i, token in enumerate(ids[1:])]
    assert response.json["logprobs"][0] == pytest.approx(expected, abs=1e-4)


def test_gate_figures_and_lineage(home: Path, tmp_path: Path) -> None:
    artifact = quantized(home, tmp_path / "q")
    gate = json.loads((artifact.path / "gate.json").read_text())
    assert (
        gate["passed"] and gate["parity"]["passed"] and gate["largest_relative_weight_error"] < 0.01
    )
    tokens = len(small_tokenizer().encode(TEXT * 3))
    assert gate["tokens"] == tokens - 1
    ratio = gate["perplexity_after"] / gate["perplexity_before"]
    assert gate["increase"] == pytest.approx(100 * (ratio - 1), rel=1e-6)
    assert artifact.metrics["perplexity_increase_percent"] == gate["increase"]
    assert {i.role for i in artifact.inputs} == {"model", "calibration data"}
    assert "gone" not in verify_lineage(artifact).values()


def test_a_second_run_is_skipped(home: Path, tmp_path: Path) -> None:
    first = quantized(home, tmp_path / "q")
    assert quantized(home, tmp_path / "q").timings == first.timings


def test_tokens_of_a_dataset(home: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "tokens_text_document"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for start in range(0, 90, 30):
            writer.add_document(np.arange(start, start + 30), [30])
    artifact = quantized(
        home, tmp_path / "q", valid_data=(), calibration_data=str(prefix), gate_tokens=40
    )
    gate = json.loads((artifact.path / "gate.json").read_text())
    assert gate["tokens"] == 29 + 9


def spoil(q: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor(q.kind, q.values_OI, q.scale_OG.roll(1, 0))


def test_wrong_scales_are_refused_and_nothing_published(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault: every row gets its neighbour's scale. Perplexity alone might not see it."""

    def wrong(tensors: Tensors, name: str, format_: Format) -> QuantizedTensor:
        return spoil(format_.quantize(tensors[name], name))

    monkeypatch.setattr(directory, "rounded", wrong)
    with pytest.raises(GateError, match=r"proj\.weight .* is not its original rounded") as caught:
        quantized(home, tmp_path / "q")
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_a_worse_model_is_refused_and_nothing_published(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault: five levels instead of 255, rounded correctly."""
    monkeypatch.setattr(int8, "LARGEST", 2)
    with pytest.raises(GateError, match=r"perplexity .*allowed \+0\.5.*--max-perplexity") as caught:
        quantized(home, tmp_path / "q", max_perplexity_increase=0.5)
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_the_limit_is_kept(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "LARGEST", 2)
    loose = quantized(home, tmp_path / "q", max_perplexity_increase=1e6)
    increase = loose.metrics["perplexity_increase_percent"]
    assert increase > 1
    with pytest.raises(GateError):
        quantized(home, tmp_path / "no", max_perplexity_increase=increase - 1e-6)
    quantized(home, tmp_path / "yes", max_perplexity_increase=increase + 1e-6)


def test_a_trained_model_passes_the_default_gate(home: Path, tmp_path: Path) -> None:
    artifact = quantized(home, tmp_path / "q", max_perplexity_increase=0.5)
    assert artifact.metrics["perplexity_before"] < 3


def test_gpt2_is_refused_with_the_reason(home: Path, tmp_path: Path) -> None:
    native = save_native(tmp_path / "gpt2", gpt2_config())
    with pytest.raises(ConversionError, match="Conv1D"):
        quantized(home, tmp_path / "q", load=str(native))


def test_what_is_quantised_already_is_refused(home: Path, tmp_path: Path) -> None:
    first = quantized(home, tmp_path / "q")
    with pytest.raises(ConversionError, match="quantised already"):
        quantized(home, tmp_path / "again", load=str(first.path))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"valid_data": ()}, ConfigError, "exactly one of"),
        ({"calibration_data": "x"}, ConfigError, "exactly one of"),
        ({"max_perplexity_increase": -1.0}, ConfigError, "at least 0"),
        ({"max_perplexity_increase": float("inf")}, ConfigError, "finite"),
        ({"format": "int4"}, ConfigError, "int8_wo"),
        ({"valid_data": "missing.txt"}, DataError, "does not exist"),
        ({"valid_data": (), "calibration_data": "missing"}, DataError, "does not exist"),
    ],
)
def test_bad_settings(
    changes: dict[str, Any], error: type[MtkError], message: str, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        quantized(home, tmp_path / "q", **changes)


def edited(home: Path, tmp_path: Path, dialect: str) -> Path:
    """A directory that mtk does not know as its own, to be damaged."""
    artifact = quantized(home, tmp_path / "q", dialect=dialect)
    folder = tmp_path / "foreign"
    shutil.copytree(artifact.path, folder)
    (folder / "artifact.json").unlink()
    return folder


def test_other_algorithms_are_named(home: Path, tmp_path: Path) -> None:
    folder = edited(home, tmp_path, "modelopt")
    path = folder / "hf_quant_config.json"
    path.write_text(path.read_text().replace("W8A16", "NVFP4"))
    with pytest.raises(ConversionError, match="NVFP4"):
        open_model(folder)
    path.unlink()
    open_model(folder)  # the inline copy alone is enough


def test_other_packings_are_named(home: Path, tmp_path: Path) -> None:
    folder = edited(home, tmp_path, "compressed-tensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match="num_bits"):
        open_model(folder)


def test_a_missing_scale_is_named(home: Path, tmp_path: Path) -> None:
    folder = edited(home, tmp_path, "compressed-tensors")
    stored = load_file(folder / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight_scale"
    del stored[lost]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=lost):
        open_model(folder)
