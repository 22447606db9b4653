"""Native -> Megatron -> another layout -> Hugging Face or native: the same bits and logits."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.artifacts import verify
from mtk.checkpoint import read_model_config
from mtk.cli.main import main
from mtk.convert.megatron.open_checkpoint import open_megatron
from mtk.convert.open_model import open_model
from mtk.convert.source import find_source
from mtk.errors import ArtifactError, ConfigError, ConversionError
from stages.convert import run
from tests.convert.megatron.checkpoints import first_file, save_ranks
from tests.convert.megatron.natives import (
    MODELS,
    assert_same_weights,
    logits,
    mixtral,
    save,
    to_megatron,
    to_native,
)
from tests.convert.models import convert_config, gpt2_config, llama, quiet, save_native

IN_HUGGING_FACE = ("gpt2", "llama-gqa", "llama-bias")
# The others are slow together.
WIDE = ("gpt2", "llama-gqa", "mixtral")


def raw(path: Path) -> dict[str, Any]:
    """A rank's file as Megatron loads it."""
    with torch.serialization.safe_globals([Namespace]):
        return dict(torch.load(path, weights_only=True))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in WIDE else [pytest.mark.slow]) for n in MODELS],
)
def test_to_another_layout_and_back(name: str, tmp_path: Path) -> None:
    config = MODELS[name]
    native = save(tmp_path / "native", config)
    before, after = ((4, 4), (2, 2)) if name in WIDE else ((2, 2), (1, 4))
    first = to_megatron(native, tmp_path / "before", *before)
    assert len(list(first.glob("release/mp_rank_*"))) == before[0] * before[1]
    narrow = to_megatron(first, tmp_path / "after", *after, target_transformer_impl="local")
    last = f"mp_rank_{after[0] - 1:02d}_{after[1] - 1:03d}"
    assert sorted(p.name for p in narrow.glob("release/*"))[-1] == last
    back = to_native(narrow, tmp_path / "back")
    assert_same_weights(native, back)
    assert torch.equal(logits(native), logits(back))
    assert read_model_config(back) == config
    parity = json.loads((narrow / "parity.json").read_text())
    assert parity["passed"] and parity["round_trip_bit_equal"] and parity["source"]["passed"]
    assert "Megatron" in parity["reference"] and "Megatron" in parity["source"]["reference"]
    if name in IN_HUGGING_FACE:
        hf = run(convert_config(narrow, tmp_path / "hf", reference="transformers"), quiet())
        assert hf.metrics["max_abs_logit_error"] <= 1e-4
        parity = json.loads((hf.path / "parity.json").read_text())
        assert "transformers" in parity["reference"] and "Megatron" in parity["source"]["reference"]
        theirs = open_model(hf.path).model
        with torch.no_grad():
            tokens = torch.arange(40).view(2, 20) * 7 % 300
            assert torch.equal(theirs(tokens), logits(native))


def test_from_hugging_face_directly(tmp_path: Path) -> None:
    native = save_native(tmp_path / "native", llama(num_query_groups=4))
    hf = run(convert_config(native, tmp_path / "hf"), quiet()).path
    made = to_megatron(hf, tmp_path / "m", 2, 1)
    artifact = find_source(made).artifact
    assert artifact is not None and artifact.kind == "megatron_model"
    verify(artifact)
    assert artifact.inputs[0].kind == "hf_model"
    with pytest.raises(ConfigError, match=r"true_vocab_size = 9.*hf, which is hf"):
        run(convert_config(hf, tmp_path / "n", to="native", true_vocab_size=9), quiet())
    back = to_native(made, tmp_path / "back")
    assert_same_weights(native, back)
    assert open_model(back).tokenizer.fingerprint == open_model(native).tokenizer.fingerprint


def test_what_is_written(tmp_path: Path) -> None:
    native = save(tmp_path / "n", llama(vocab_size=301))
    made = to_megatron(native, tmp_path / "m", 2, 2, dtype="bf16")
    assert (made / "latest_checkpointed_iteration.txt").read_text() == "release"
    content = raw(made / "release" / "mp_rank_01_001" / "model_optim_rng.pt")
    assert content["checkpoint_version"] == 3.0 and content["iteration"] == 0
    args = vars(content["args"])
    expected = {
        "num_query_groups": 2,
        "group_query_attention": True,
        "padded_vocab_size": 512,
        "vocab_size": 301,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "normalization": "RMSNorm",
        "params_dtype": torch.bfloat16,
        "bf16": True,
        "swiglu": True,
    }
    assert {name: args[name] for name in expected} == expected
    model = content["model"]
    assert list(model) == [
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers.0.self_attention.linear_proj.weight",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc2.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]
    assert {tensor.dtype for tensor in model.values()} == {torch.bfloat16}
    assert all(t.untyped_storage().nbytes() == t.numel() * 2 for t in model.values())
    words = raw(first_file(made))["model"]["embedding.word_embeddings.weight"]
    assert words.shape == (256, 32)
    tail = model["output_layer.weight"][301 - 256 :]
    assert torch.equal(tail, tail[:1].expand_as(tail))


def test_one_rank_has_no_copy_of_a_tied_matrix(tmp_path: Path) -> None:
    native = save(tmp_path / "n", gpt2_config())
    made = to_megatron(native, tmp_path / "m", 1, 1)
    assert first_file(made).parent.name == "mp_rank_00"
    assert "output_layer.weight" not in raw(first_file(made))["model"]


# -- layouts mtk reads but does not write -------------------------------------------------


def rewrite(made: Path, root: Path, models: dict[tuple[int, ...], Any], **args: Any) -> Path:
    """A checkpoint of ``models`` with the arguments of ``made``, but for ``args``."""
    stated = raw(first_file(made))["args"]
    for name, value in args.items():
        setattr(stated, name, value)
    return save_ranks(root, models, args=stated, version=3.0, iteration=7)


def experts_of(model: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """What an expert-parallel rank keeps of a model."""
    found = {}
    for name, tensor in model.items():
        if ".local_experts." in name:
            head, rest = name.split(".local_experts.")
            number, tail = rest.split(".", 1)
            local = int(number) - rank * (4 // ranks)
            if not 0 <= local < 4 // ranks:
                continue
            name = f"{head}.local_experts.{local}.{tail}"
        found[name] = tensor
    return found


@pytest.mark.parametrize("pipeline", [1, 2])
def test_expert_parallel_ranks(pipeline: int, tmp_path: Path) -> None:
    native = save(tmp_path / "n", mixtral())
    made = to_megatron(native, tmp_path / "m", 2, pipeline)
    models: dict[tuple[int, ...], Any] = {}
    for folder in made.glob("release/mp_rank_*"):
        numbers = [int(part) for part in folder.name.split("_")[2:]]
        whole = raw(folder / "model_optim_rng.pt")["model"]
        for rank in range(2):
            models[*numbers, rank] = experts_of(whole, rank, 2)
    source = rewrite(made, tmp_path / "ep", models, expert_model_parallel_size=2)
    assert_same_weights(native, to_native(source, tmp_path / "back"))


def te_grouped(model: dict[str, Any]) -> dict[str, Any]:
    """As TEGroupedMLP names them."""
    found = {}
    for name, tensor in model.items():
        if ".local_experts." in name:
            head, rest = name.split(".local_experts.")
            number, matrix, _ = rest.split(".")
            name = f"{head}.{matrix}.weight{number}"
        found[name] = tensor
    return found | {"decoder.layers.0.mlp.experts.linear_fc1._extra_state": None}


def grouped(model: dict[str, Any]) -> dict[str, Any]:
    """As GroupedMLP keeps them: [in, experts x out] by its shape, in memory [experts, in, out]."""
    found = {name: tensor for name, tensor in model.items() if ".local_experts." not in name}
    heads = {name.split(".local_experts.")[0] for name in set(model) - set(found)}
    for head in heads:
        ups, downs = (
            torch.stack(
                [model[f"{head}.local_experts.{i}.linear_fc{n}.weight"].T for i in range(4)]
            )
            for n in (1, 2)
        )
        found[f"{head}.weight1"] = ups.reshape(ups.shape[1], -1)
        found[f"{head}.weight2"] = downs.reshape(-1, downs.shape[2])
    return found


@pytest.mark.parametrize("spelling", [te_grouped, grouped])
def test_spellings_of_experts(spelling: Any, tmp_path: Path) -> None:
    native = save(tmp_path / "n", mixtral())
    made = to_megatron(native, tmp_path / "m", 2, 1)
    models = {
        (rank,): spelling(
            raw(made / "release" / f"mp_rank_0{rank}" / "model_optim_rng.pt")["model"]
        )
        for rank in range(2)
    }
    source = rewrite(made, tmp_path / "g", models)
    assert_same_weights(native, to_native(source, tmp_path / "back"))


def test_virtual_stages_and_stages_of_unlike_sizes(tmp_path: Path) -> None:
    native = save(tmp_path / "n", MODELS["gpt2"])
    made = to_megatron(native, tmp_path / "m", 1, 4)
    chunks = [
        raw(made / "release" / f"mp_rank_00_00{stage}" / "model_optim_rng.pt")["model"]
        for stage in range(4)
    ]
    args = raw(first_file(made))["args"]
    args.pipeline_model_parallel_size = 2
    args.virtual_pipeline_model_parallel_size = 2
    root = save_ranks(tmp_path / "v", {(0, 0): {}, (0, 1): {}}, args=args, version=3.0)
    for stage in range(2):
        path = root / "release" / f"mp_rank_00_00{stage}" / "model_optim_rng.pt"
        content = {"args": args, "checkpoint_version": 3.0, "iteration": 9}
        torch.save(content | {"model0": chunks[stage], "model1": chunks[stage + 2]}, path)
    assert_same_weights(native, to_native(root, tmp_path / "back"))
    # Three stages of 1, 1 and 2 layers.
    last = {
        name.replace("layers.0", "layers.1"): tensor for name, tensor in chunks[3].items()
    } | chunks[2]
    models = {(0, 0): chunks[0], (0, 1): chunks[1], (0, 2): last}
    args.virtual_pipeline_model_parallel_size = None
    args.pipeline_model_parallel_size = 3
    uneven = save_ranks(tmp_path / "u", models, args=args, version=3.0)
    assert_same_weights(native, to_native(uneven, tmp_path / "back2"))


def test_more_tensor_ranks_than_groups(tmp_path: Path) -> None:
    """Megatron cuts the fused rows evenly then, in the middle of a group."""
    native = save(tmp_path / "n", llama(num_query_groups=2))
    made = to_megatron(native, tmp_path / "m", 1, 1)
    whole = raw(first_file(made))["model"]
    models: dict[tuple[int, ...], Any] = {}
    for rank in range(4):
        own = {}
        for name, tensor in whole.items():
            if "layer_norm" in name or "layernorm" in name:
                own[name] = tensor
            elif "linear_fc1" in name:
                own[name] = torch.cat([half.chunk(4)[rank] for half in tensor.chunk(2)])
            else:
                row = "linear_proj" in name or "linear_fc2" in name
                own[name] = tensor.chunk(4, 1 if row else 0)[rank].clone()
        models[(rank,)] = own
    source = rewrite(made, tmp_path / "t", models, tensor_model_parallel_size=4)
    assert_same_weights(native, to_native(source, tmp_path / "back"))


# -- options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "pipeline", "message"),
    [
        (3, 1, r"target_tensor_parallel_size = 3.*num_query_groups = 2.*Nearest: 2"),
        (4, 1, r"target_tensor_parallel_size = 4.*num_query_groups = 2.*Nearest: 2"),
        (1, 3, r"target_pipeline_parallel_size = 3.*num_layers = 4.*Nearest: [24]"),
    ],
)
def test_sizes_that_do_not_divide(tensor: int, pipeline: int, message: str, tmp_path: Path) -> None:
    native = save(tmp_path / "n", llama(num_layers=4))
    with pytest.raises(ConfigError, match=message):
        to_megatron(native, tmp_path / "m", tensor, pipeline)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"to": "hf", "target_tensor_parallel_size": 2},
        {"to": "megatron", "target_tensor_parallel_size": 0},
        {"to": "megatron", "source": "native", "true_vocab_size": 9},
        {"to": "native", "target_transformer_impl": "local"},
    ],
)
def test_options_that_mean_nothing(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        convert_config(Path("a"), Path("b"), **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation": "relu"}, "activation = relu"),
        ({"activation": "gelu-tanh", "add_bias_linear": False}, "gelu-tanh"),
    ],
)
def test_models_megatron_has_not(changes: Any, reason: str, tmp_path: Path) -> None:
    native = save(tmp_path / "n", gpt2_config(**changes))
    with pytest.raises(ConversionError, match=reason):
        to_megatron(native, tmp_path / "m", 1, 1)


def test_the_command_line(tmp_path: Path) -> None:
    native = save(tmp_path / "n", gpt2_config())
    command = ["convert", "--load", str(native), "--save", str(tmp_path / "m"), "--to", "megatron"]
    assert main([*command, "--target-tensor-parallel-size", "3"]) == 2
    assert main([*command, "--target-tensor-parallel-size", "2"]) == 0
    load = ["convert", "--load", str(tmp_path / "m"), "--from", "megatron"]
    assert main([*load, "--save", str(tmp_path / "b"), "--to", "native"]) == 0
    # Resharding to the layout it has gives the same model again.
    assert main([*load, "--save", str(tmp_path / "c"), "--to", "megatron"]) == 0
    assert open_megatron(tmp_path / "c").ranks.sizes.tensor == 2
    with pytest.raises(ArtifactError, match="mtk convert --load"):
        open_model(tmp_path / "m")
