"""Damaged and hostile directories: named in the error, nothing executed, exit code 4."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtk.cli.main import main
from mtk.convert.mapping import Rename, WeightTable
from mtk.convert.open_model import open_model
from mtk.errors import ArtifactError, ConversionError, MtkError
from stages.convert import run
from tests.convert.models import convert_config, gpt2_config, llama, quiet, save_native

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    found = {}
    for name, config in {"llama": llama(), "gpt2": gpt2_config()}.items():
        native = save_native(folder / name, config, tokenizer=False)
        found[name] = run(convert_config(native, folder / f"{name}-hf"), quiet()).path
    shards = convert_config(folder / "llama", folder / "shards", max_shard_size=20_000)
    found["shards"] = run(shards, quiet()).path
    return found


@pytest.fixture
def foreign(exports: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy without artifact.json, as if it came from elsewhere."""

    def copy(name: str) -> Path:
        target = tmp_path / "foreign"
        shutil.copytree(exports[name], target)
        (target / "artifact.json").unlink()
        return target

    return copy


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def index(change: Callable[[dict[str, str]], object]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        data = json.loads(path.read_text())
        change(data["weight_map"])
        path.write_text(json.dumps(data))

    return damage


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-00001-of-*"))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


NORM = "model.norm.weight"
TIED = "lm_head.weight"
CASES: dict[str, tuple[str, Damage, str]] = {
    "missing weight": ("llama", weights(lambda t: t.pop(NORM)), "1 missing: model.norm"),
    "extra weight": (
        "llama",
        weights(lambda t: t.update(odd=torch.ones(1))),
        "without a place: odd",
    ),
    "wrong shape": ("llama", weights(lambda t: t.update({NORM: torch.ones(31)})), r"\[31\]"),
    "wrong vocabulary": ("llama", config(vocab_size=299), r"embed_tokens.*asks for 299"),
    "fused part too small": ("gpt2", config(n_embd=36), "weight|bias|shape"),
    "tied copy differs": (
        "llama",
        weights(lambda t: t.update({TIED: torch.ones(300, 32)})),
        "tied",
    ),
    "remote code": ("llama", config(auto_map={"AutoModel": "x.Y"}), "never runs"),
    "unknown family": (
        "llama",
        config(model_type="rwkv"),
        "'rwkv'; this mtk reads gpt2, llama, mistral",
    ),
    "an original": ("llama", config(model_type=None), "names no model_type: .*mamba_ssm"),
    "number as text": ("llama", config(num_hidden_layers="2"), "'2' is not of type int"),
    "no heads": ("llama", config(num_attention_heads=None), "num_attention_heads is missing"),
    "activation": ("llama", config(hidden_act="relu"), "only silu"),
    "biases that are not there": ("llama", config(attention_bias=True), "8 missing.*k_proj.bias"),
    "truncated file": (
        "llama",
        lambda d: (d / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}"),
        "model.safetensors cannot be read",
    ),
    "config is a list": (
        "llama",
        lambda d: (d / "config.json").write_text("[]"),
        "object",
    ),
    "config is no JSON": (
        "llama",
        lambda d: (d / "config.json").write_text("{"),
        "cannot",
    ),
    "only pickles": ("llama", pickled, "pytorch_model.bin.*safe_serialization"),
    "missing shard": (
        "shards",
        lambda d: first_shard(d).unlink(),
        "model-00001-of.*cannot be read",
    ),
    "path upwards": ("shards", index(lambda m: m.update({NORM: "../x.safetensors"})), "outside"),
    "absolute path": ("shards", index(lambda m: m.update({NORM: "/x.safetensors"})), "outside"),
    "pickle in index": ("shards", index(lambda m: m.update({NORM: "x.bin"})), "not safetensors"),
    "index lacks a weight": ("shards", index(lambda m: m.pop(NORM)), "disagree"),
    "two sets of weights": (
        "shards",
        lambda d: shutil.copy(first_shard(d), d / "model.safetensors"),
        "holds both model.safetensors and model.safetensors.index.json",
    ),
    "index is a list": (
        "shards",
        lambda d: (d / "model.safetensors.index.json").write_text("[]"),
        "not a readable index",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_damage_is_named(name: str, foreign: Callable[[str], Path], tmp_path: Path) -> None:
    source, damage, message = CASES[name]
    folder = foreign(source)
    damage(folder)
    with pytest.raises(ArtifactError, match=message) as caught:
        open_model(folder)
    assert caught.value.exit_code == 4
    with pytest.raises(MtkError, match=message):
        run(convert_config(folder, tmp_path / "out", to="native"), quiet())
    assert not (tmp_path / "out").exists()


def test_an_undamaged_copy_opens(foreign: Callable[[str], Path]) -> None:
    assert open_model(foreign("shards")).artifact is None


def test_all_complaints_come_at_once(foreign: Callable[[str], Path]) -> None:
    folder = foreign("llama")
    config(hidden_act="relu", mlp_bias="no", rope_scaling={"type": "linear"})(folder)
    with pytest.raises(ConversionError) as caught:
        open_model(folder)
    assert all(word in str(caught.value) for word in ("hidden_act", "mlp_bias", "rope_scaling"))


def test_an_edited_artifact_is_refused(exports: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(exports["llama"], tmp_path / "copy")
    weights(lambda t: t.update(odd=torch.ones(1)))(tmp_path / "copy")
    with pytest.raises(ArtifactError, match="records"):
        open_model(tmp_path / "copy")


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        open_model(tmp_path / "none")
    with pytest.raises(ArtifactError, match="is no model"):
        open_model(tmp_path)
    (tmp_path / "mp_rank_00.pt").write_bytes(pickle.dumps({}))
    with pytest.raises(ArtifactError, match=r"only pickles \(mp_rank_00\.pt\)"):
        open_model(tmp_path)


def test_a_table_with_a_weight_twice_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="more than one rule"):
        WeightTable((Rename("a", "x"), Rename("b", "x")))


def test_a_weight_the_table_forgot_is_an_error() -> None:
    tensors = {"a": torch.ones(1), "b": torch.ones(1)}
    with pytest.raises(ConversionError, match="without a place: b"):
        WeightTable((Rename("a", "x"),)).as_foreign(tensors)
    with pytest.raises(ConversionError, match="missing: x"):
        WeightTable((Rename("a", "x"),)).as_native({})


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--to", "native"], 0),
        (["--to", "native", "--from", "native"], 2),
        (["--to", "onnx"], 2),
        (["--to", "hf"], 4),
        (["--to", "native", "--tolerance", "1e-12"], 5),
        (["--to", "native", "--tolerance", "inf"], 2),
    ],
)
def test_exit_codes(
    arguments: list[str], code: int, exports: dict[str, Path], tmp_path: Path
) -> None:
    command = ["convert", "--load", str(exports["llama"]), "--save", str(tmp_path / "out")]
    assert main([*command, "--reference", "plain", *arguments]) == code
    assert (tmp_path / "out").exists() == (code == 0)
