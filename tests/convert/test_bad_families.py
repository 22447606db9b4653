"""What a directory of these families may say that mtk cannot hold, or must not believe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtk.convert.families import FAMILIES, family_for
from mtk.convert.hf_directory import read_hf_model
from mtk.convert.open_model import open_model
from mtk.errors import ConfigError, ConversionError
from stages.convert import run
from tests.convert.models import (
    bloom,
    convert_config,
    gemma,
    gpt2_config,
    llama,
    neox,
    quiet,
    save_native,
)

CONFIGS = {
    "llama": llama(),
    "mistral": llama(window_size=5),
    "qwen2": llama(add_qkv_bias=True),
    "qwen3": llama(qk_layernorm=True),
    "gemma": gemma(),
    "gpt_neox": neox(),
    "bloom": bloom(),
    "gpt2": gpt2_config(),
    "mixtral": llama(num_experts=4, moe_ffn_hidden_size=16, rotary_base=1e6),
}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("exports")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            native = save_native(folder / name, CONFIGS[name], tokenizer=False)
            made[name] = run(convert_config(native, folder / f"{name}-hf"), quiet()).path
        return made[name]

    return get


def edited(source: Path, target: Path, changes: dict[str, Any]) -> Path:
    """A foreign copy with another config.json; values that are ... are left out."""
    target.mkdir()
    data = json.loads((source / "config.json").read_text()) | changes
    data = {key: value for key, value in data.items() if value is not ...}
    (target / "config.json").write_text(json.dumps(data))
    (target / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    return target


def scaled(**values: Any) -> dict[str, Any]:
    return {"rope_scaling": ..., "rope_parameters": {**ROPE, **values}}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", scaled(rope_type="dynamic", factor=2.0), "'dynamic' is not supported; mtk knows"),
    ("llama", scaled(rope_type="longrope", short_factor=[1.0]), "'longrope' is not supported"),
    ("llama", scaled(rope_type=3), "rope_type = 3 is not supported"),
    ("llama", scaled(rope_type="linear"), "rope_parameters: factor is missing"),
    ("llama", scaled(rope_type="linear", factor="2"), "factor = '2' is not of type float"),
    ("llama", scaled(rope_type="linear", factor=0.1), "rope_scaling_factor = 0.1: must be at"),
    ("llama", scaled(rope_type="llama3", factor=8.0), "low_freq_factor is missing"),
    ("llama", scaled(mrope_section=[1, 2]), "default rope has no mrope_section"),
    ("llama", scaled(partial_rotary_factor=0.5), "rotates 0.5 of each head; this family"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "say different things"),
    ("llama", {"rope_parameters": [1]}, "is not an object"),
    ("mistral", {"sliding_window": 0}, "window_size = 0: must be at least 1"),
    ("mistral", {"sliding_window": "5"}, "sliding_window = '5' is not of type int"),
    ("mistral", {"layer_types": ["full_attention"]}, "one kind of attention"),
    ("mistral", {"hidden_act": "gelu"}, "only silu"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "some layers only"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "there is no sliding_window"),
    (
        "qwen3",
        {
            "layer_types": None,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
        "some layers only",
    ),
    ("gemma", {"hidden_act": "silu"}, "tanh approximation"),
    ("gemma", {"hidden_activation": "relu"}, "gelu_pytorch_tanh"),
    ("gemma", {"use_bidirectional_attention": True}, "not supported"),
    ("gpt_neox", {"rotary_pct": 0.1, "rope_parameters": ...}, "rotates 0 of 8 channels"),
    ("gpt_neox", {"hidden_act": "silu"}, "supported are"),
    ("gpt_neox", {"use_parallel_residual": "yes"}, "'yes' is not of type bool"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "not supported"),
    ("bloom", {"auto_map": {"AutoModel": "x.Y"}}, "never runs"),
    ("bloom", {"num_hidden_layers": 3}, "num_hidden_layers = 3 and n_layer = 2 are the same"),
    (
        "llama",
        scaled(rope_type="yarn", original_max_position_embeddings=0),
        "original_max_position_embeddings = 0: must be above 0",
    ),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_refused(
    name: str, changes: dict[str, Any], message: str, exports: Any, tmp_path: Path
) -> None:
    folder = edited(exports(name), tmp_path / "foreign", changes)
    with pytest.raises(ConversionError, match=message) as caught:
        open_model(folder)
    assert "config.json" in str(caught.value)


READ: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # What the spelling before transformers 5 says.
    (
        "llama",
        {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_scaling_type": "linear", "rope_scaling_factor": 2.0},
    ),
    (
        "llama",
        {
            "rope_parameters": ...,
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        {
            "rotary_base": 5e5,
            "rope_scaling_factor": 32.0,
            "rope_original_max_positions": 8192,
        },
    ),
    (
        "llama",
        scaled(rope_type="yarn", factor=None, original_max_position_embeddings=6),
        {"rope_scaling_factor": 4.0, "rope_original_max_positions": 6},
    ),
    ("mistral", {"sliding_window": ...}, {"window_size": 4096}),
    ("mistral", {"sliding_window": None}, {"window_size": None}),
    ("qwen2", {"use_sliding_window": ..., "sliding_window": 3}, {"window_size": None}),
    ("gemma", {"hidden_act": "gelu", "hidden_activation": None}, {"activation": "geglu-tanh"}),
    (
        "gpt_neox",
        {"rope_parameters": ..., "rotary_emb_base": 700, "rotary_pct": 1.0},
        {"rotary_base": 700.0, "rotary_percent": 1.0},
    ),
    ("bloom", {"n_head": ..., "num_attention_heads": 2}, {"num_attention_heads": 2}),
    ("bloom", {"n_embed": None}, {"hidden_size": 32}),
    (
        "gpt2",
        {"n_head": ..., "num_attention_heads": 2, "n_positions": ..., "max_position_embeddings": 9},
        {"num_attention_heads": 2, "positions": 9},
    ),
]


@pytest.mark.parametrize(("name", "changes", "expected"), READ, ids=str)
def test_other_spellings(
    name: str,
    changes: dict[str, Any],
    expected: dict[str, Any],
    exports: Any,
    tmp_path: Path,
) -> None:
    config = read_hf_model(edited(exports(name), tmp_path / "foreign", changes)).config
    assert {key: getattr(config, key) for key in expected} == expected


SILENT: list[tuple[str, dict[str, Any]]] = [
    ("gpt_neox", dict.fromkeys(("use_parallel_residual", "attention_bias", "layer_norm_eps"))),
    ("bloom", {"n_layer": ..., "layer_norm_epsilon": None}),
    ("mixtral", {"rms_norm_eps": None, "rope_theta": None, "rope_parameters": None}),
]


@pytest.mark.parametrize(("name", "changes"), SILENT, ids=str)
def test_null_and_nothing_mean_the_same_to_both_sides(
    name: str, changes: dict[str, Any], exports: Any, tmp_path: Path
) -> None:
    folder = edited(exports(name), tmp_path / "foreign", changes)
    run(convert_config(folder, tmp_path / "native", to="native"), quiet())
    assert read_hf_model(folder).config.norm_epsilon == 1e-5
    if None in changes.values():
        pytest.importorskip("transformers")
        options = {"to": "native", "reference": "transformers"}
        with pytest.raises(
            ConversionError, match=r"transformers does not take .*--reference plain"
        ):
            run(convert_config(folder, tmp_path / "strict", **options), quiet())
        assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_that_are_missing_left_over_or_of_another_shape(
    name: str, exports: Any, tmp_path: Path
) -> None:
    """Of every kind of weight the last one; the folder and the tensor are named."""
    folder = edited(exports(name), tmp_path / "foreign", {})
    whole = load_file(folder / "model.safetensors")
    last = {".".join(each.split(".")[-2:]): each for each in whole}
    for victim in last.values():
        for change in (
            {each: tensor for each, tensor in whole.items() if each != victim},
            whole | {f"{victim}_extra": torch.ones(1)},
            whole | {victim: torch.ones(3, 3)},
        ):
            save_file(change, folder / "model.safetensors")
            with pytest.raises(ConversionError) as caught:
                open_model(folder)
            assert str(folder) in str(caught.value) and victim in str(caught.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_family_is_unambiguous(name: str) -> None:
    assert family_for(CONFIGS[name]).model_type == name
    assert family_for(CONFIGS[name], name).model_type == name


def test_the_wanted_family(tmp_path: Path) -> None:
    assert family_for(llama(), "mistral").model_type == "mistral"
    with pytest.raises(ConversionError, match="qk_layernorm = False: Qwen3 has norms"):
        family_for(llama(), "qwen3")
    with pytest.raises(ConfigError, match="no family that mtk writes: gpt2, llama, mistral"):
        family_for(llama(), "rwkv")
    with pytest.raises(ConfigError, match=r"Nearest: gpt_neox\."):
        family_for(llama(), "gpt-neox")
    with pytest.raises(ConfigError, match="none is written"):
        convert_config(tmp_path, tmp_path, to="native", hf_family="llama")


def test_an_option_no_family_knows_is_a_reason_against_all() -> None:
    config, text = llama(activation="geglu", scale_embeddings=True), ""
    for family in FAMILIES:
        with pytest.raises(ConversionError) as caught:
            family_for(config, family.model_type)
        text += str(caught.value)
    assert text.count("scale_embeddings = True") == 12 and text.count("activation = geglu") == 12


def test_the_nearest_families_come_first() -> None:
    """All reasons of all families were 69 lines; BERT is one reason away from any decoder."""
    with pytest.raises(ConversionError) as caught:
        family_for(llama(window_size=8, position_embedding_type="alibi"))
    lines = str(caught.value).splitlines()
    assert lines[1:3] == [
        "  not MistralForCausalLM:",
        "      - position_embedding_type = alibi: Mistral rotates (rope)",
    ]
    assert len(lines) < 12 and "not Bert" not in str(caught.value)
    assert lines[-1].startswith("  Further from it: ") and "bert" in lines[-1]
