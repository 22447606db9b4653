"""Layers, types, rules, derivation, digests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtk.config import Layer, config_digest, leaves, make, resolve, to_dict
from mtk.config.coerce import CoercionError, coerce
from mtk.config.files import read_layer, set_layer, write_config
from mtk.config.pretrain import PretrainConfig
from mtk.config.recipes import RECIPES, recipe_layer
from mtk.errors import ConfigError
from stages.registry import STAGES, stage

GOOD: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "lr": 1e-3,
    "data_path": ["x"],
    "save": "out",
    "train_iters": 100,
}


def test_later_layers_win_and_origins_are_known() -> None:
    layers = [
        Layer("recipe", {"num_layers": 12, "lr": 1.0}),
        Layer("a.yaml", {"model": {"num_layers": 6}, "optimizer": {"lr": 0.1}}),
        Layer("command line", {**GOOD, "lr": "0.01"}),
        Layer("--set", {"model.num_layers": 3}),
    ]
    resolved = resolve(PretrainConfig, layers)
    assert resolved.config.model.num_layers == 3
    assert resolved.config.optimizer.lr == 0.01
    assert resolved.origins["model.num_layers"] == "--set"
    assert resolved.origins["optimizer.lr"] == "command line"
    assert resolved.origins["optimizer.adam_eps"] == "default"


def test_dashes_and_groups_and_flat_names_mean_the_same() -> None:
    for key in ("num-layers", "num_layers", "model.num-layers"):
        others = {name: value for name, value in GOOD.items() if name != "num_layers"}
        assert make(PretrainConfig, **others, **{key: 7}).model.num_layers == 7


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hiden_size": 3}, ["unknown option", "hidden_size"]),
        ({"num_layers": "four"}, ["model.num_layers", "whole number"]),
        ({"num_layers": 2.5}, ["whole number"]),
        ({"num_layers": True}, ["whole number"]),
        ({"lr": "fast"}, ["optimizer.lr", "number"]),
        ({"hidden_size": 30}, ["num_attention_heads", "Nearest: 32"]),
        ({"num_query_groups": 3}, ["num_query_groups", "Nearest"]),
        ({"seq_length": 64, "max_position_embeddings": 32}, ["max_position_embeddings"]),
        ({"micro_batch_size": 3, "global_batch_size": 8}, ["multiple", "Nearest: 6 or 9"]),
        ({"micro_batch_size": 0}, ["at least 1"]),
        ({"train_samples": 10}, ["exactly one"]),
        ({"train_iters": None}, ["exactly one"]),
        ({"lr": -1}, ["greater than 0"]),
        ({"min_lr": 1.0}, ["min_lr"]),
        ({"lr_warmup_iters": 1, "lr_warmup_fraction": 0.1}, ["give one of"]),
        ({"lr_warmup_samples": 10}, ["lr-warmup-iters"]),
        ({"lr_decay_style": "WSD"}, ["lr-wsd-decay-iters"]),
        ({"weight_decay_incr_style": "linear"}, ["start-weight-decay"]),
        ({"rampup_batch_size": [1, 2, 100], "global_batch_size": 8}, ["INCREMENT"]),
        ({"rampup_batch_size": [1, 2]}, ["takes 3 values"]),
        ({"data_path": []}, ["no data given"]),
        ({"mock_data": True}, ["excludes"]),
        ({"data_path": [], "mock_data": True}, ["vocab_size"]),
        ({"keep_checkpoints": 1}, ["at least 2"]),
        ({"finetune": True}, ["needs --load"]),
        ({"position_embedding_type": "rotary"}, ["must be one of"]),
        ({"position_embedding_type": "rope", "rotary_percent": 0.1}, ["rotary_percent"]),
        ({"tensor_model_parallel_size": 3}, ["Nearest: 2"]),
        ({"pipeline_model_parallel_size": 4}, ["4 stages of 2 layers", "Nearest: 2"]),
        ({"context_parallel_size": 3}, ["seq_length", "Nearest: 12 or 18"]),
        ({"context_parallel_size": 2}, ["model.attention_dropout", "all_gather (or a2a)"]),
        (
            {"context_parallel_size": 3, "cp_comm_type": "a2a"},
            ["context_parallel_size", "heads", "Nearest: 2", "p2p or all_gather"],
        ),
        (
            {"position_embedding_type": "none", "reset_position_ids": True},
            ["data.reset_position_ids", "no effect"],
        ),
        ({"sequence_parallel": True}, ["--tp"]),
        ({"save": None}, ["save", "must be"]),
        ({"hidden_dropout": 1.5}, ["[0, 1)"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_configurations_say_key_rule_and_fix(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        make(PretrainConfig, **{**GOOD, **changes})
    assert error.value.exit_code == 2
    for part in parts:
        assert part in str(error.value)


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        make(PretrainConfig, **{**GOOD, "hidden_size": 30, "lr": -1, "micro_batch_size": 0})
    assert {"model.hidden_size", "optimizer.lr", "batch.micro_batch_size"} <= {
        problem.key for problem in error.value.problems
    }


def test_missing_options_are_named_once_each() -> None:
    with pytest.raises(ConfigError) as error:
        make(PretrainConfig, num_layers="x")
    keys = [problem.key for problem in error.value.problems]
    assert len(keys) == len(set(keys)) and "optimizer.lr" in keys


def test_derived_values() -> None:
    model = make(PretrainConfig, **{**GOOD, "activation": "swiglu", "hidden_size": 4096}).model
    assert (model.ffn_hidden_size, model.kv_channels) == (10880, 1024)
    assert model.num_query_groups == 4 and model.max_position_embeddings == 16


@pytest.mark.parametrize(
    ("vocab", "padded"), [(50257, 50304), (30522, 30592), (32000, 32000), (128256, 128256)]
)
def test_vocabulary_padding(vocab: int, padded: int) -> None:
    config = make(PretrainConfig, **{**GOOD, "vocab_size": vocab})
    assert config.model.padded_vocab_size == padded


def test_saved_configuration_gives_the_same_run(tmp_path: Path) -> None:
    config = make(PretrainConfig, **GOOD, adam_beta2=0.95, train_data_path=(), split="9,1,0")
    write_config(to_dict(config), tmp_path / "config.yaml")
    again = resolve(PretrainConfig, [read_layer(tmp_path / "config.yaml")]).config
    assert again == config and config_digest(again) == config_digest(config)


def test_runtime_options_stay_out_of_the_digest() -> None:
    base = make(PretrainConfig, **GOOD)
    assert config_digest(make(PretrainConfig, **GOOD, log_interval=7)) == config_digest(base)
    assert config_digest(make(PretrainConfig, **GOOD, seed=7)) != config_digest(base)


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("1e3", int, 1000),
        ("9007199254740993", int, 9007199254740993),
        ("1_000", int, 1000),
        (3, float, 3.0),
        ("1e-4", float, 1e-4),
        ("yes", bool, True),
        ("off", bool, False),
        (None, int | None, None),
        ("none", int | None, None),
        ("a", tuple[str, ...], ("a",)),
        ([1, "2"], tuple[int, int], (1, 2)),
    ],
)
def test_coercion(value: Any, annotation: Any, expected: Any) -> None:
    result = coerce(value, annotation)
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [("1.5", int), (1.5, int), ("", int), ("maybe", bool), ([1], str), (None, str), ({}, float)],
)
def test_coercion_refuses(value: Any, annotation: Any) -> None:
    with pytest.raises((CoercionError, TypeError)):
        coerce(value, annotation)


@pytest.mark.parametrize("text", ["[1, 2", "- a\n- b", "just text"])
def test_yaml_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        read_layer(tmp_path / "a.yaml")


def test_missing_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_layer(tmp_path / "none.yaml")


def test_set_layer_reads_yaml_values() -> None:
    layer = set_layer(["model.num_layers=3", "data.data_path=[0.3, a]", "checkpoint.save=x=y"])
    assert layer.values == {
        "model.num_layers": 3,
        "data.data_path": [0.3, "a"],
        "checkpoint.save": "x=y",
    }
    with pytest.raises(ConfigError, match="not an assignment"):
        set_layer(["oops"])


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_resolve(name: str) -> None:
    rest = {"data_path": ["x"], "save": "out", "vocab_size": 50257}
    length = {} if "train_iters" in RECIPES[name] else {"train_iters": 10_000}
    layers = [Layer("test", {"recipe": name, **rest, **length})]
    assert stage("pretrain").resolve(layers).config.recipe == name


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="gpt-345m"):
        recipe_layer("gpt-345")


@pytest.mark.parametrize("entry", STAGES, ids=lambda entry: entry.name)
def test_option_names_are_unique_within_a_stage(entry: Any) -> None:
    """Flat names (in YAML and as flags) must mean one option."""
    found = list(leaves(entry.config_class))
    flags = [leaf.name for leaf in found]
    flags += [alias for leaf in found for alias in leaf.spec.aliases]
    flags += [flag for leaf in found for flag, _ in leaf.spec.shortcuts]
    assert len(flags) == len(set(flags))
    assert all(leaf.spec.help.strip().endswith((".", ")")) for leaf in found)
