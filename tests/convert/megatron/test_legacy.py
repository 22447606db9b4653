"""Checkpoints of Megatron up to 2.x, the published GPT-345M's layout among them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mtk.checkpoint import load_model
from mtk.convert.megatron import published
from mtk.convert.megatron.comparable import MegatronFiles
from mtk.convert.megatron.open_checkpoint import Given, open_megatron, read_given
from mtk.convert.megatron.pickles import StoredTensor
from mtk.convert.megatron.published import Published, published_arguments
from mtk.convert.megatron.torch_file import TorchFile
from mtk.errors import ArtifactError, ConfigError, ConversionError
from stages.convert import run
from tests.convert.megatron.checkpoints import (
    HEADS,
    POSITIONS,
    ROWS,
    VOCAB,
    gpt2,
    legacy,
    legacy_args,
    save_ranks,
)
from tests.convert.models import convert_config, quiet

TOKENS_BS = torch.arange(40).view(2, 20) * 7 % VOCAB
OPTIMIZER = {
    "optimizer": {"fp32_from_fp16_params": [[torch.randn(3)]], "state": {0: {"step": 1}}},
    "random_rng_state": (3, (1, 2, 3), None),
    "rng_tracker_states": {"model-parallel-rng": torch.zeros(16, dtype=torch.uint8)},
}


def import_legacy(tmp_path: Path, source: Path, **options: Any) -> torch.Tensor:
    artifact = run(convert_config(source, tmp_path / "native", to="native", **options), quiet())
    with torch.no_grad():
        return load_model(artifact.path).model(TOKENS_BS)


def small_published(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"num_attention_heads": HEADS, "bias_gelu_fusion": True, "true_vocab_size": VOCAB}
    entry = Published("GPT-tiny", 2, 48, POSITIONS, ROWS, arguments)
    monkeypatch.setattr(published, "PUBLISHED", (entry,))


def test_the_published_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No arguments, no version, fp16, written before torch 1.6: GPT-345M but for its sizes."""
    small_published(monkeypatch)
    model = gpt2().half().float()
    ranks = legacy(model, dtype=torch.float16)
    source = save_ranks(tmp_path / "345m", ranks, zipped=False, extra=OPTIMIZER)
    logits = import_legacy(tmp_path, source)
    with torch.no_grad():
        expected = model(TOKENS_BS).logits
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= 1e-4
    hf = run(convert_config(source, tmp_path / "hf", reference="transformers"), quiet())
    assert hf.metrics["max_abs_logit_error"] <= 1e-4
    again = type(model).from_pretrained(hf.path, dtype=torch.float32)
    theirs = {name: tensor.half() for name, tensor in again.state_dict().items()}
    for name, tensor in model.state_dict().items():
        assert torch.equal(theirs[name], tensor.half()), name


def test_gpt_345m_is_known() -> None:
    sizes = {
        "num_layers": 24,
        "hidden_size": 1024,
        "max_position_embeddings": 1024,
        "padded_vocab_size": 50304,
    }
    known = published_arguments(sizes)
    assert known["num_attention_heads"] == 16 and known["true_vocab_size"] == 50257
    assert published_arguments({**sizes, "num_layers": 23}) == {}


@pytest.mark.parametrize("version", [0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 2)])
def test_every_version_and_layout(
    version: float, tensor: int, pipeline: int, tmp_path: Path
) -> None:
    model = gpt2(4)
    ranks = legacy(model, version=int(version), tensor=tensor, pipeline=pipeline)
    args = legacy_args(model, tensor, pipeline)
    source = save_ranks(tmp_path / "m", ranks, args=args, version=version, iteration=5000)
    logits = import_legacy(tmp_path, source, true_vocab_size=VOCAB)
    with torch.no_grad():
        assert (logits - model(TOKENS_BS).logits).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("norms", "names"),
    [
        (("input_norm", "post_attention_norm", "final_norm"), ("encoder", "self_attention")),
        (
            ("input_layernorm", "post_attention_layernorm", "final_layernorm"),
            ("encoder", "self_attention"),
        ),
    ],
)
def test_spellings_of_later_versions(norms: Any, names: Any, tmp_path: Path) -> None:
    model = gpt2()
    ranks = legacy(model, version=3, norms=norms, names=names)
    source = save_ranks(tmp_path / "m", ranks, args=legacy_args(model), version=3.0)
    logits = import_legacy(tmp_path, source, true_vocab_size=VOCAB)
    with torch.no_grad():
        assert (logits - model(TOKENS_BS).logits).abs().max() <= 1e-4


def test_without_a_true_vocabulary_all_rows_are_ids(tmp_path: Path) -> None:
    model = gpt2()
    source = save_ranks(tmp_path / "m", legacy(model), args=legacy_args(model), version=0)
    logits = import_legacy(tmp_path, source)
    assert logits.shape[-1] == ROWS
    with torch.no_grad():
        assert (logits[..., :VOCAB] - model(TOKENS_BS).logits).abs().max() <= 1e-4


def test_arguments_in_a_file(tmp_path: Path) -> None:
    model = gpt2()
    source = save_ranks(tmp_path / "m", legacy(model))
    with pytest.raises(ConversionError) as caught:
        open_megatron(source)
    assert "num_attention_heads is missing" in str(caught.value)
    assert "bias_gelu_fusion is missing" in str(caught.value)
    path = tmp_path / "args.yaml"
    path.write_text(yaml.safe_dump({"num-attention-heads": HEADS, "bias_gelu_fusion": True}))
    logits = import_legacy(tmp_path, source, megatron_args=str(path), true_vocab_size=VOCAB)
    with torch.no_grad():
        assert (logits - model(TOKENS_BS).logits).abs().max() <= 1e-4

    # Other arguments are another conversion, even from a file of the same name.
    path.write_text(yaml.safe_dump({"num-attention-heads": HEADS, "bias_gelu_fusion": False}))
    with pytest.raises(ArtifactError, match="--force"):
        import_legacy(tmp_path, source, megatron_args=str(path), true_vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_atention_heads": 4}, "no argument that mtk reads.*Nearest: num_attention_heads"),
        ({"swiglu": None}, "swiglu is a part of the model and cannot be taken back"),
    ],
)
def test_arguments_nobody_would_read(args: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "args.yaml"
    path.write_text(yaml.safe_dump(args))
    with pytest.raises(ConfigError, match=message):
        read_given(str(path), None)


def test_one_rank_of_a_late_version_without_arguments(tmp_path: Path) -> None:
    """Its folder's name says that there are no other ranks."""
    source = save_ranks(tmp_path / "m", legacy(gpt2(), version=3), version=3.0)
    given = Given({"num_attention_heads": HEADS, "bias_gelu_fusion": True})
    assert open_megatron(source, given).ranks.sizes.tensor == 1


def test_a_tensor_named_in_two_ways(tmp_path: Path) -> None:
    model = gpt2()
    ranks = legacy(model)
    ranks[0, 0]["language_model"]["transformer.layers"] = {
        "0.mlp.dense_4h_to_h.bias": torch.ones(48)
    }
    source = save_ranks(tmp_path / "m", ranks, args=legacy_args(model))
    with pytest.raises(ConversionError, match=r"holds .*dense_4h_to_h\.bias twice"):
        open_megatron(source)


def test_given_arguments_may_not_contradict_the_files(tmp_path: Path) -> None:
    model = gpt2()
    source = save_ranks(tmp_path / "m", legacy(model), args=legacy_args(model))
    with pytest.raises(ConversionError, match=r"num_attention_heads = 4, --megatron-args says 8"):
        open_megatron(source, Given({"num_attention_heads": 8}))


def test_t5_is_named(tmp_path: Path) -> None:
    model = gpt2()
    ranks = legacy(model)
    ranks[0, 0]["language_model"]["decoder"] = {"final_layernorm.weight": torch.ones(48)}
    source = save_ranks(tmp_path / "m", ranks, args=legacy_args(model))
    with pytest.raises(ConversionError, match=r"holds a T5 model .*converts GPT and BERT"):
        open_megatron(source)


def test_the_certificate_reads_a_layer_when_it_computes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not all layers for each of them; the tied matrix is needed twice."""
    model = gpt2(4)
    source = save_ranks(tmp_path / "m", legacy(model), args=legacy_args(model))
    files = MegatronFiles(open_megatron(source))
    true, counts = TorchFile.tensor, Counter[str]()

    def counted(self: TorchFile, stored: StoredTensor) -> torch.Tensor:
        counts[stored.storage.key] += 1
        return true(self, stored)

    monkeypatch.setattr(TorchFile, "tensor", counted)
    files.forward(TOKENS_BS)
    assert sorted(counts.values())[-2:] == [1, 2]
