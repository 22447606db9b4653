"""mtk convert both ways, checked with the plain reference forward."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtk.artifacts import verify
from mtk.checkpoint import load_model
from mtk.config.model import ModelConfig
from mtk.convert import publish_model
from mtk.convert.families import family_for
from mtk.convert.open_model import open_model, read_native
from mtk.convert.source import find_source
from mtk.errors import ArtifactError, ConfigError, ConversionError, GateError
from mtk.session import Session
from stages.convert import run
from tests.convert.models import (
    convert_config,
    gpt2_config,
    llama,
    quiet,
    save_native,
    small_tokenizer,
)

MATRIX = [
    {
        "num_query_groups": groups,
        "untie_embeddings_and_output_weights": untied,
        "vocab_size": vocab,
        "add_bias_linear": bias,
    }
    for groups, untied, vocab, bias in itertools.product(
        (4, 2, 1), (False, True), (384, 385, 383), (False, True)
    )
]


def label(changes: dict[str, Any]) -> str:
    return "-".join(str(int(value)) for value in changes.values())


def there_and_back(config: ModelConfig, tmp_path: Path, **options: Any) -> None:
    """Native -> Hugging Face -> native: same logits, and the same files would be written again."""
    native = save_native(tmp_path / "native", config, tokenizer=False)
    there = run(convert_config(native, tmp_path / "hf", **options), quiet())
    back = run(convert_config(there.path, tmp_path / "back", to="native", **options), quiet())
    before, after = (load_model(p).model for p in (native, back.path))
    x_BS = torch.arange(48).view(2, 24)
    assert torch.equal(before(x_BS), after(x_BS))
    first = load_file(there.path / "model.safetensors")
    same, tensors = read_native(find_source(back.path))
    second = family_for(same).weights(same).as_foreign(tensors)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    parity = json.loads((there.path / "parity.json").read_text())
    assert parity["passed"] and parity["max_abs_logit_error"] <= parity["limit"] <= 1e-4
    assert parity["prompts"] == 8 and parity["top1_agreement"] == 1.0 and parity["kl"] < 1e-8
    assert parity["logit_spread"] > 1 and parity["round_trip_bit_equal"]


@pytest.mark.parametrize("changes", MATRIX, ids=label)
def test_llama_matrix(changes: dict[str, Any], tmp_path: Path) -> None:
    there_and_back(llama(**changes), tmp_path)


@pytest.mark.parametrize("activation", ["gelu", "gelu-tanh", "relu", "squared-relu"])
@pytest.mark.parametrize("untied", [False, True])
def test_gpt2_matrix(activation: str, untied: bool, tmp_path: Path) -> None:
    changes = {"activation": activation, "untie_embeddings_and_output_weights": untied}
    there_and_back(gpt2_config(**changes, vocab_size=385, ffn_hidden_size=72), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"kv_channels": 24}, {"rotary_base": 500.0}, {"norm_epsilon": 1e-3}, {"num_layers": 5}],
    ids=str,
)
def test_llama_sizes(changes: dict[str, Any], tmp_path: Path) -> None:
    there_and_back(llama(**changes), tmp_path)


def test_the_artifact_has_a_tokenizer_lineage_and_certificate(tmp_path: Path) -> None:
    native = save_native(tmp_path / "native", llama())
    artifact = run(convert_config(native, tmp_path / "hf"), quiet())
    verify(artifact)
    assert artifact.kind == "hf_model" and artifact.inputs[0].kind == "checkpoint"
    assert {"config.json", "generation_config.json", "model.safetensors", "parity.json"} <= {
        entry.path for entry in artifact.files
    }
    opened = open_model(artifact.path)
    assert opened.tokenizer.fingerprint == small_tokenizer().fingerprint
    assert opened.artifact is not None and opened.artifact.digest == artifact.digest
    config = json.loads((artifact.path / "config.json").read_text())
    assert config["eos_token_id"] == small_tokenizer().eod


def test_a_tokenizer_that_is_left_out_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native = save_native(tmp_path / "native", llama(), tokenizer=False)
    there = run(convert_config(native, tmp_path / "hf"), quiet()).path
    (there / "artifact.json").unlink()
    (there / "tokenizer.model").write_bytes(b"x")
    run(convert_config(there, tmp_path / "back", to="native"), Session())
    assert "has no tokenizer.json: its tokenizer (tokenizer.model)" in " ".join(
        "".join(capsys.readouterr()).split()
    )


def test_a_reference_that_is_not_there_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish_model, "transformers_installed", lambda: False)
    monkeypatch.setattr(publish_model, "read_native", lambda source: pytest.fail("was read"))
    native = save_native(tmp_path / "native", llama(), tokenizer=False)
    with pytest.raises(ConfigError, match="--reference plain"):
        run(convert_config(native, tmp_path / "hf", reference="transformers"), quiet())


def test_a_second_run_is_skipped_and_another_configuration_refused(tmp_path: Path) -> None:
    native = save_native(tmp_path / "native", llama())
    first = run(convert_config(native, tmp_path / "hf"), quiet())
    assert run(convert_config(native, tmp_path / "hf"), quiet()).timings == first.timings
    with pytest.raises(ArtifactError, match="--force"):
        run(convert_config(native, tmp_path / "hf", dtype="bf16"), quiet())


def test_the_training_length_survives(tmp_path: Path) -> None:
    config = llama(seq_length=12, max_position_embeddings=40)
    native = save_native(tmp_path / "native", config, tokenizer=False)
    artifact = run(convert_config(native, tmp_path / "hf"), quiet())
    assert artifact.metrics["top1_agreement"] == 1.0
    found = open_model(artifact.path).config
    assert (found.seq_length, found.positions) == (12, 40)


def test_shards_with_an_index(tmp_path: Path) -> None:
    native = save_native(tmp_path / "native", llama())
    artifact = run(convert_config(native, tmp_path / "hf", max_shard_size=20_000), quiet())
    index = json.loads((artifact.path / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3 and all((artifact.path / name).is_file() for name in files)
    assert not (artifact.path / "model.safetensors").exists()
    tensors = [load_file(artifact.path / name) for name in files]
    size = sum(t.numel() * t.element_size() for part in tensors for t in part.values())
    assert index["metadata"]["total_size"] == size
    x_BS = torch.arange(20).view(2, 10)
    assert torch.equal(open_model(artifact.path).model(x_BS), load_model(native).model(x_BS))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_is_certified_against_rounded_weights(dtype: str, tmp_path: Path) -> None:
    native = save_native(tmp_path / "native", llama())
    artifact = run(convert_config(native, tmp_path / "hf", dtype=dtype), quiet())
    stored = load_file(artifact.path / "model.safetensors")
    assert {str(t.dtype) for t in stored.values()} == {
        {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[dtype]
    }
    config = json.loads((artifact.path / "config.json").read_text())
    assert config["dtype"] == {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    assert artifact.metrics["max_abs_logit_error"] <= 1e-4


def test_fp16_overflow_is_refused(tmp_path: Path) -> None:
    native = save_native(tmp_path / "native", llama())
    hf = run(convert_config(native, tmp_path / "hf"), quiet()).path
    weights = load_file(hf / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    save_file(weights, foreign / "model.safetensors")
    (foreign / "config.json").write_text((hf / "config.json").read_text())
    with pytest.raises(ConversionError, match=r"final_norm\.weight holds 1e\+05.*bf16"):
        run(convert_config(foreign, tmp_path / "out", to="native", dtype="fp16"), quiet())
    assert not (tmp_path / "out").exists()


def test_a_failed_gate_publishes_nothing(tmp_path: Path) -> None:
    native = save_native(tmp_path / "native", llama())
    with pytest.raises(GateError, match="allowed"):
        run(convert_config(native, tmp_path / "hf", tolerance=1e-12), quiet())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["native", "native-tokenizer"]


def test_every_reason_is_listed(tmp_path: Path) -> None:
    config = llama(normalization="LayerNorm", activation="relu", add_qkv_bias=True)
    native = save_native(tmp_path / "native", config)
    with pytest.raises(ConversionError) as caught:
        run(convert_config(native, tmp_path / "hf"), quiet())
    text = str(caught.value)
    for field in ("normalization = LayerNorm", "activation = relu", "add_qkv_bias", "add_bias"):
        assert field in text
    assert "not Qwen2ForCausalLM" in text and "--hf-family NAME says why" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"to": "native"}, "native already"), ({"source": "hf", "to": "native"}, "--from says hf")],
)
def test_wrong_directions(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    native = save_native(tmp_path / "native", llama())
    with pytest.raises(ConversionError, match=message):
        run(convert_config(native, tmp_path / "x", **changes), quiet())
