"""Exports as transformers sees them, and transformers' own models as mtk reads them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtk.config import make
from mtk.config.evaluate import EvaluateConfig
from mtk.config.quantize import QuantizeConfig
from mtk.convert.open_model import OpenedModel, open_model
from mtk.errors import ConversionError
from stages.convert import run
from stages.evaluate import run as evaluate
from stages.quantize import run as quantize
from tests.convert.models import (
    TEXT,
    VOCAB,
    convert_config,
    gpt2_config,
    llama,
    quiet,
    save_native,
    small_tokenizer,
)

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")

CONFIGS = {
    "llama-gqa-tied": llama(),
    "llama-mqa-untied-bias": llama(
        num_query_groups=1, untie_embeddings_and_output_weights=True, add_bias_linear=True
    ),
    "llama-mha-wide-heads": llama(num_query_groups=4, kv_channels=24, rotary_base=500000.0),
    "llama-odd-vocabulary": llama(vocab_size=385),
    "llama-trained-shorter": llama(max_position_embeddings=48),
    "gpt2": gpt2_config(),
    "gpt2-exact-gelu-untied": gpt2_config(
        activation="gelu", untie_embeddings_and_output_weights=True, ffn_hidden_size=72
    ),
    "gpt2-relu": gpt2_config(activation="relu"),
    "gpt2-squared-relu": gpt2_config(activation="squared-relu", vocab_size=383),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """Everything transformers logs at WARNING or above while the test runs."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Collect(logging.WARNING)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def continuation(opened: OpenedModel, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(opened.model(torch.tensor([ids]))[0, -1].argmax()))
    return ids


@pytest.mark.parametrize("name", CONFIGS)
def test_certificate_and_greedy_text(name: str, tmp_path: Path, complaints: list[str]) -> None:
    native = save_native(tmp_path / "native", CONFIGS[name])
    artifact = run(convert_config(native, tmp_path / "hf", reference="transformers"), quiet())
    parity = json.loads((artifact.path / "parity.json").read_text())
    assert parity["reference"].startswith("transformers ") and parity["passed"]
    assert parity["max_abs_logit_error"] <= 1e-4 and parity["kl"] <= 1e-8
    assert parity["top1_agreement"] == 1.0
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        artifact.path, output_loading_info=True
    )
    assert not any(report.values())
    opened = open_model(native)
    prompt = [5, 17, 3, 200]
    found = model.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=[]
    )
    assert found[0].tolist() == continuation(opened, prompt, 20)
    assert complaints == []


def test_pipeline_and_tokenizer_work_offline_as_they_are(
    tmp_path: Path, complaints: list[str]
) -> None:
    native = save_native(tmp_path / "native", llama())
    path = run(convert_config(native, tmp_path / "hf"), quiet()).path
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert tokenizer(TEXT).input_ids == small_tokenizer().encode(TEXT)
    assert tokenizer.eos_token_id == small_tokenizer().eod
    generate = transformers.pipeline("text-generation", model=str(path))
    text = generate("the quick", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("the quick")
    assert complaints == []


def foreign_model(kind: str, **changes: Any) -> Any:
    """A randomly initialised model made by transformers itself; weights are loud."""
    torch.manual_seed(7)
    if kind == "llama":
        values = {
            "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80,
            "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
            "max_position_embeddings": 64, "initializer_range": 0.3,
        }  # fmt: skip
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(values | changes)))
    values = {
        "vocab_size": VOCAB, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64,
        "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(values | changes)))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-3}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}),
        ("gpt2", {}),
        ("gpt2", {"tie_word_embeddings": False, "n_inner": 100}),
        ("gpt2", {"activation_function": "gelu", "layer_norm_epsilon": 1e-3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("shards", ["5GB", "30KB"])
def test_foreign_models_come_in_and_go_out_bit_equal(
    kind: str, changes: dict[str, Any], shards: str, tmp_path: Path
) -> None:
    model = foreign_model(kind, **changes).eval()
    model.save_pretrained(tmp_path / "foreign", max_shard_size=shards)
    native = run(
        convert_config(
            tmp_path / "foreign", tmp_path / "native", to="native", reference="transformers"
        ),
        quiet(),
    )
    assert {i.kind for i in native.inputs} == {"file"}
    x_BS = torch.randint(VOCAB, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(x_BS).logits
    assert (open_model(native.path).model(x_BS) - expected).abs().max() < 1e-4
    assert (open_model(tmp_path / "foreign").model(x_BS) - expected).abs().max() < 1e-4
    back = run(convert_config(native.path, tmp_path / "back"), quiet()).path
    before: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "foreign").glob("*.safetensors"):
        before |= load_file(file)
    after = load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_files_of_the_base_class_lack_the_prefix(tmp_path: Path) -> None:
    model = foreign_model("gpt2").eval()
    model.transformer.save_pretrained(tmp_path / "base")
    names = load_file(tmp_path / "base" / "model.safetensors")
    assert "wte.weight" in names
    x_BS = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(x_BS).logits
    assert (open_model(tmp_path / "base").model(x_BS) - expected).abs().max() < 1e-4


def test_masks_of_published_files_are_passed_over(tmp_path: Path) -> None:
    """transformers knows one of the two buffers that it once saved."""
    model = foreign_model("gpt2").eval()
    model.save_pretrained(tmp_path / "foreign")
    tensors = load_file(tmp_path / "foreign" / "model.safetensors")
    for i in range(3):
        tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, tmp_path / "foreign" / "model.safetensors", metadata={"format": "pt"})
    options = {"to": "native", "reference": "transformers"}
    native = run(convert_config(tmp_path / "foreign", tmp_path / "native", **options), quiet())
    x_BS = torch.arange(20)[None]
    with torch.no_grad():
        assert (open_model(native.path).model(x_BS) - model(x_BS).logits).abs().max() < 1e-4


def test_dynamic_rope_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    foreign_model("llama", rope_parameters=rope).save_pretrained(tmp_path / "foreign")
    with pytest.raises(ConversionError, match="rope_type = 'dynamic' is not supported"):
        open_model(tmp_path / "foreign")


def test_perplexity_is_the_loss_transformers_computes(tmp_path: Path) -> None:
    native = save_native(tmp_path / "native", llama())
    path = run(convert_config(native, tmp_path / "hf"), quiet()).path
    data = tmp_path / "text.txt"
    data.write_text(TEXT[:20], encoding="utf-8")
    config = make(
        EvaluateConfig,
        load=str(path),
        task="WIKITEXT103",
        valid_data=str(data),
        output=str(tmp_path / "out"),
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = torch.tensor([tokenizer(TEXT[:20]).input_ids])
    assert ids.shape[1] <= 24
    with torch.no_grad():
        loss = transformers.AutoModelForCausalLM.from_pretrained(path)(ids, labels=ids).loss
    assert evaluate(config, quiet()).metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize("format_", ["int8_wo", "fp8", "int4_wo"])
def test_compressed_tensors_load_in_transformers(
    format_: str, tmp_path: Path, complaints: list[str]
) -> None:
    """A third party decodes the packed weights to the same model, bit for bit in fp32; in FP8 it
    rounds activations besides."""
    pytest.importorskip("compressed_tensors")
    native = save_native(tmp_path / "native", llama(hidden_size=32, ffn_hidden_size=64))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    config = make(
        QuantizeConfig,
        load=str(native),
        save=str(tmp_path / "q"),
        format=format_,
        group_size=32,
        dialect="compressed-tensors",
        valid_data=str(tmp_path / "text.txt"),
        max_perplexity_increase=1e6,
    )
    path = quantize(config, quiet()).path
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    x_BS = torch.arange(40).view(2, 20)
    with torch.no_grad():
        found = model(x_BS).logits
    expected = open_model(path).model(x_BS)
    full = open_model(native).model(x_BS)
    if format_ == "fp8":
        assert 0 < (found - expected).norm() / expected.norm() < 0.2
    else:
        assert (found - expected).abs().max() < 1e-3
        assert (found - full).norm() > 10 * (found - expected).norm()
    assert complaints == []
