"""Damaged and contradicting checkpoints: file and tensor named, exit code 4, nothing written."""

from __future__ import annotations

import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.convert.source import find_source
from mtk.errors import ArtifactError, ConversionError
from stages.convert import run
from tests.convert.megatron.checkpoints import edit, first_file
from tests.convert.megatron.natives import assert_same_weights, mixtral, save, to_megatron
from tests.convert.models import convert_config, gpt2_config, llama, quiet

Damage = Callable[[Path], object]
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    configs = {"gpt2": gpt2_config(), "llama": llama(), "mixtral": mixtral(num_layers=2)}
    return {
        name: to_megatron(save(folder / f"{name}-n", config), folder / name, 2, 2)
        for name, config in configs.items()
    }


def tracker(content: str) -> Damage:
    return lambda root: (root / TRACKER).write_text(content)


def rank(tensor: int, pipeline: int) -> Callable[[Path], Path]:
    def find(root: Path) -> Path:
        return root / "release" / f"mp_rank_{tensor:02d}_{pipeline:03d}" / "model_optim_rng.pt"

    return find


LAST = rank(1, 1)


def model(change: Callable[[dict[str, Any]], object], where: Any = first_file) -> Damage:
    return lambda root: edit(where(root), lambda content: change(content["model"]))


def args(where: Any = first_file, **values: Any) -> Damage:
    def change(content: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(content["args"], name, value)

    return lambda root: edit(where(root), change)


def everywhere(**values: Any) -> Damage:
    def damage(root: Path) -> None:
        for path in root.glob("release/*/model_optim_rng.pt"):
            edit(path, lambda content: vars(content["args"]).update(values))

    return damage


def hostile(root: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return print, ("ran",)

    edit(LAST(root), lambda content: content.update(extra=Runs()))


def _of_version_0(content: dict[str, Any]) -> None:
    """Names as they were when rows had other orders."""
    content["checkpoint_version"] = 0
    for name in list(content["model"]):
        if "linear_qkv" in name and "norm" not in name:
            old = name.replace("linear_qkv", "query_key_value")
            content["model"][old] = content["model"].pop(name)


def shrunk(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


NORM = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
PROJ = "decoder.layers.0.self_attention.linear_proj.weight"
WORDS = "embedding.word_embeddings.weight"
EXPERT = "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight"
CASES: dict[str, tuple[str, Damage, str]] = {
    "tracker goes upwards": ("gpt2", tracker("../../x"), r"latest_.*'\.\./\.\./x'.*number"),
    "tracker is absolute": ("gpt2", tracker("/etc"), "number or 'release'"),
    "tracker is a word": ("gpt2", tracker("latest"), "'latest'; it must be"),
    "tracker is negative": ("gpt2", tracker("-3"), "'-3'; it must be"),
    "tracker is empty": ("gpt2", tracker(""), "it must be"),
    "tracker is a fraction": ("gpt2", tracker("1.5"), "it must be"),
    "tracker is of another alphabet": ("gpt2", tracker("١٢"), "it must be"),
    "tracker is no text": (
        "gpt2",
        lambda root: (root / TRACKER).write_bytes(b"\xff\xfe"),
        "cannot be read",
    ),
    "iteration is missing": ("gpt2", tracker("12"), r"iter_0000012 does not exist"),
    "a rank is missing": (
        "gpt2",
        lambda root: shutil.rmtree(LAST(root).parent),
        r"2 tensor x 2 pipeline.*missing: mp_rank_01_001",
    ),
    "a rank too many": (
        "gpt2",
        lambda root: shutil.copytree(LAST(root).parent, root / "release" / "mp_rank_02_001"),
        "too many: mp_rank_02_001",
    ),
    "a rank without a file": (
        "gpt2",
        lambda root: LAST(root).unlink(),
        "mp_rank_01_001 has neither model_optim_rng.pt",
    ),
    "a folder with another name": (
        "gpt2",
        lambda root: LAST(root).parent.rename(root / "release" / "mp_rank_1_1"),
        "mp_rank_1_1 is no folder of a rank",
    ),
    "folders with more numbers": (
        "gpt2",
        lambda root: [
            path.rename(path.with_name(f"{path.name}_000"))
            for path in list((root / "release").iterdir())
        ],
        "numbers in its name",
    ),
    "another format": (
        "gpt2",
        lambda root: (
            [shutil.rmtree(path) for path in (root / "release").iterdir()],
            (root / "release" / ".metadata").write_text(""),
        ),
        "another format.*--ckpt-convert-format torch",
    ),
    "a hostile pickle": ("gpt2", hostile, r"mp_rank_01_001.*builtins\.print"),
    "a truncated file": (
        "gpt2",
        lambda root: LAST(root).write_bytes(LAST(root).read_bytes()[:3000]),
        "mp_rank_01_001.*cut short",
    ),
    "a pickle of something else": (
        "gpt2",
        lambda root: LAST(root).write_bytes(pickle.dumps({})),
        "mp_rank_01_001.*(not one of torch.save|damaged)",
    ),
    "no model": (
        "gpt2",
        lambda root: edit(LAST(root), lambda content: content.pop("model")),
        "mp_rank_01_001.*has no model0",
    ),
    "a model that is a list": (
        "gpt2",
        lambda root: edit(LAST(root), lambda content: content.update(model=[1])),
        "mp_rank_01_001.*no dict of tensors",
    ),
    "arguments that are a list": (
        "gpt2",
        lambda root: edit(LAST(root), lambda content: content.update(args=[1])),
        "args is no namespace",
    ),
    "version unknown": (
        "gpt2",
        lambda root: edit(first_file(root), lambda c: c.update(checkpoint_version=4.0)),
        "checkpoint_version is 4.0",
    ),
    "versions disagree": (
        "gpt2",
        lambda root: edit(LAST(root), lambda c: c.update(checkpoint_version=2.0)),
        "mp_rank_01_001.*checkpoint_version is 2.0",
    ),
    "arguments disagree": (
        "gpt2",
        args(LAST, norm_epsilon=1e-3),
        r"mp_rank_01_001.*norm_epsilon = 0\.001.*mp_rank_00_000.*1e-05",
    ),
    "a tensor missing": (
        "gpt2",
        model(lambda t: t.pop(NORM), LAST),
        r"mp_rank_01_001.*1 missing: decoder\.layers\.1\.input_layernorm\.weight",
    ),
    "a tensor too many": (
        "gpt2",
        model(lambda t: t.update({"decoder.layers.0.odd": torch.ones(1)}), LAST),
        r"mp_rank_01_001.*without a place: decoder\.layers\.0\.odd",
    ),
    "a tensor twice": (
        "gpt2",
        model(lambda t: t.update({"decoder.layers.0.input_layernorm.weight": t[NORM]}), LAST),
        "again as",
    ),
    "another shape on one rank": (
        "gpt2",
        model(shrunk(PROJ), LAST),
        r"mp_rank_01_001.*linear_proj\.weight has shape \[31, 16\].*\[32, 16\]",
    ),
    "another type on one rank": (
        "gpt2",
        model(lambda t: t.update({PROJ: t[PROJ].half()}), LAST),
        r"decoder\.layers\.1\.self_attention\.linear_proj\.weight as \['torch\.float",
    ),
    "copies that differ": (
        "gpt2",
        model(lambda t: t[NORM].add_(1), LAST),
        r"mp_rank_01_001.*layer_norm_weight.*differs from the copy in .*mp_rank_00_001",
    ),
    "a tied copy that differs": (
        "gpt2",
        model(lambda t: t["output_layer.weight"].add_(1), LAST),
        r"output_layer\.weight differs from embedding\.word_embeddings",
    ),
    "no word embeddings": ("gpt2", model(lambda t: t.pop(WORDS)), "no matrix of word embeddings"),
    "fewer rows on one rank": ("gpt2", model(shrunk(WORDS)), "padded_vocab_size = 512, but"),
    "another vocabulary": (
        "gpt2",
        everywhere(vocab_size=600),
        r"vocabulary of 600 in an embedding of 512 rows.*--true-vocab-size",
    ),
    "layers without end": (
        "gpt2",
        everywhere(num_layers=10**12),
        "num_layers = 1000000000000: mtk's models have up to 99999",
    ),
    "experts without end": ("mixtral", everywhere(num_experts=10**12), "router.weight has shape"),
    "padding without end": (
        "gpt2",
        everywhere(make_vocab_size_divisible_by=10**12),
        "make_vocab_size_divisible_by = 1000000000000, but the embedding has 512 rows",
    ),
    "grouped queries before there were any": (
        "llama",
        lambda root: [edit(path, _of_version_0) for path in root.glob("release/*/*.pt")],
        r"query_key_value\.weight of checkpoint_version 0.*num_query_groups = 2",
    ),
    "chunks and arguments disagree": (
        "gpt2",
        everywhere(virtual_pipeline_model_parallel_size=2),
        "mp_rank_00_000.*1 chunks of the model, but virtual_pipeline_model_parallel_size is 2",
    ),
    "a layer less": ("gpt2", everywhere(num_layers=3), "stages hold 2 layers.*num_layers = 3"),
    "other heads": ("llama", everywhere(num_attention_heads=8), r"linear_qkv\.weight has shape"),
    "an expert missing": ("mixtral", model(lambda t: t.pop(EXPERT)), r"experts \[0, 1, 2\]"),
    "experts cut another way": (
        "mixtral",
        everywhere(expert_tensor_parallel_size=1),
        "expert_tensor_parallel_size = 1",
    ),
    "a size that is no number": (
        "gpt2",
        everywhere(tensor_model_parallel_size="2"),
        "tensor_model_parallel_size is '2'",
    ),
    "a size beyond reason": (
        "gpt2",
        everywhere(pipeline_model_parallel_size=10**9),
        "pipeline_model_parallel_size is 1000000000",
    ),
    "names without end": (
        "gpt2",
        model(lambda t: t.update(loop=_nested(20))),
        "no dict of tensors",
    ),
}


def _nested(depth: int) -> dict[str, Any]:
    return {"x": _nested(depth - 1)} if depth else {}


@pytest.mark.parametrize("name", CASES)
def test_damage_is_named(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    kind, damage, message = CASES[name]
    root = tmp_path / "source"
    shutil.copytree(sources[kind], root)
    (root / "artifact.json").unlink()
    damage(root)
    with pytest.raises(ConversionError, match=message) as caught:
        run(convert_config(root, tmp_path / "out", to="native"), quiet())
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_an_undamaged_copy_converts_from_its_iteration(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """``--load`` may be a folder with ranks; no tracker is looked for."""
    root = tmp_path / "iter_0000001"
    shutil.copytree(sources["gpt2"] / "release", root)
    artifact = run(convert_config(root, tmp_path / "out", to="native"), quiet())
    assert [record.path.endswith(".pt") for record in artifact.inputs] == [True] * 4
    for part in (first_file(sources["gpt2"]), first_file(sources["gpt2"]).parent):
        with pytest.raises(ArtifactError, match=r"part of a Megatron.*take all of it: .*release"):
            find_source(part)


@pytest.mark.parametrize("version", [None, 1.0])
def test_core_weights_have_one_order(
    version: float | None, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Megatron reorders rows by version in weights called ``query_key_value`` alone."""
    root = tmp_path / "source"
    shutil.copytree(sources["gpt2"] / "release", root)
    for path in root.glob("*/model_optim_rng.pt"):
        edit(path, lambda content: content.pop("checkpoint_version"))
        if version is not None:
            edit(path, lambda content: content.update(checkpoint_version=version))
    run(convert_config(root, tmp_path / "out", to="native"), quiet())
    assert_same_weights(sources["gpt2"].with_name("gpt2-n"), tmp_path / "out")


def test_the_optimizer_and_other_state_is_passed_over(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "source"
    shutil.copytree(sources["gpt2"], root)
    (root / "artifact.json").unlink()
    state = {"optimizer": {"state": {0: torch.ones(3)}}, "rng_state": [{"np": ("MT19937", 1)}]}
    edit(first_file(root), lambda content: content.update(state, more=Namespace(x=1)))
    run(convert_config(root, tmp_path / "out", to="native"), quiet())
