"""Adapters through the stages: what a checkpoint holds, resuming, merging with a certificate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import mtk.convert.adapters
from mtk.checkpoint import load_model, read_tensors
from mtk.config import make
from mtk.config.convert import ConvertConfig
from mtk.config.evaluate import EvaluateConfig
from mtk.convert.adapters import apart
from mtk.convert.open_model import assemble, open_model, read_native
from mtk.convert.source import find_source
from mtk.errors import CheckpointError, GateError
from mtk.models.lora import merged
from serving.open_served import open_served
from stages import convert, evaluate
from stages.finetune import run
from tests.convert.models import llama, save_native
from tests.finetune.runs import (
    LAYOUTS,
    QUIET,
    assert_close,
    layouts,
    options,
    train,
    weight_files,
    write_lines,
)
from tests.finetune.test_sft import talks

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "lora_targets": "all", "lr": 0.05}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    save_native(folder / "base", llama(seq_length=48, max_position_embeddings=64, num_layers=2))
    write_lines(folder / "talk.jsonl", talks(30))
    run(config(folder, folder / "tuned"), QUIET)
    return folder


def config(home: Path, save: Path, **changes: Any) -> Any:
    own = {"train_data": [str(home / "talk.jsonl")], "chat_template": "plain", **LORA}
    return options("sft", home / "base", save, **{**own, **changes})


def tuned(home: Path) -> Path:
    return home / "tuned" / "step_00000004"


def converted(load: Path, save: Path, to: str, **changes: Any) -> Path:
    wanted = make(ConvertConfig, load=str(load), save=str(save), to=to, **changes)
    return convert.run(wanted, QUIET).path


TOKENS = torch.arange(40).view(2, 20) * 5


def test_a_checkpoint_holds_adapters_only(home: Path) -> None:
    names = set(read_tensors(tuned(home), "model"))
    assert len(names) == 2 * 7 * 2 and all(".lora." in name for name in names)
    states = set(read_tensors(tuned(home), "optimizer"))
    assert {name.split(".", 1)[1] for name in states} == names
    with pytest.raises(CheckpointError, match=r"holds adapters only.*mtk convert"):
        load_model(home / "tuned")


def test_experts_and_their_biases_stay_as_they_are(home: Path, tmp_path: Path) -> None:
    """Layouts, even that of one process, make the parameters of experts anew."""
    moe = {"num_experts": 4, "moe_router_score_function": "sigmoid"}
    model = llama(
        seq_length=48,
        max_position_embeddings=64,
        num_layers=1,
        moe_router_enable_expert_bias=True,
        moe_shared_expert_intermediate_size=16,
        **moe,
    )
    base = save_native(tmp_path / "moe", model)
    changes = {"pretrained_checkpoint": str(base), "lora_targets": "attention", "train_iters": 2}
    run(config(home, tmp_path / "run", **changes), QUIET)
    before, after = (
        read_tensors(base, "model"),
        read_tensors(tmp_path / "run" / "step_00000002", "model"),
    )
    kept = [name for name in after if ".lora." not in name]
    assert kept == ["layers.0.mlp.router.expert_bias"]
    assert torch.equal(after[kept[0]], before[kept[0]])
    merged_model = open_model(tmp_path / "run").model
    assert torch.equal(merged_model.get_parameter("layers.0.mlp.experts.up"),
                       before["layers.0.mlp.experts.up"])  # fmt: skip


def test_opened_it_is_merged_and_equals_what_was_trained(home: Path) -> None:
    source = find_source(home / "tuned")
    beside = assemble(*apart(source, read_native), source.folder)
    opened = open_model(home / "tuned")
    expected, found = beside(TOKENS), opened.model(TOKENS)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    base = open_model(home / "base").model(TOKENS)
    assert (found - base).abs().max() > 1e-3 * base.abs().max()
    assert opened.config.lora.lora_rank is None
    assert torch.equal(open_served(str(home / "tuned"), dtype=torch.float32, device="cpu")
                       .model(TOKENS), found)  # fmt: skip


def test_resumes_bit_for_bit(home: Path, tmp_path: Path) -> None:
    changes = {"train_iters": 6, "save_interval": 3, "keep_checkpoints": 0, "lora_dropout": 0.2}
    for name in ("straight", "stopped"):
        run(config(home, tmp_path / name, **changes), QUIET)
    shutil.rmtree(tmp_path / "stopped" / "step_00000006")
    run(config(home, tmp_path / "stopped", **changes), QUIET)
    assert weight_files(tmp_path / "straight") == weight_files(tmp_path / "stopped")


@pytest.mark.parametrize("name", layouts("tp2-sp", "dp2-full", without="cp"))
def test_ranks_write_the_same_adapters(home: Path, tmp_path: Path, name: str) -> None:
    one = train(config(home, tmp_path / "one", lr=1e-3))
    other = train(config(home, tmp_path / name, lr=1e-3, nproc=2, **LAYOUTS[name]))
    assert_close(other, one, 1e-5)
    first, second = (read_tensors(tmp_path / n / "step_00000004", "model") for n in ("one", name))
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=1e-3, atol=1e-4, msg=key)


def test_bf16_keeps_frozen_weights_in_bf16(home: Path, tmp_path: Path) -> None:
    for name, layout in (("one", {}), ("full", {"nproc": 2, **LAYOUTS["dp2-full"]})):
        figures = train(config(home, tmp_path / name, precision="bf16", lr=1e-3, **layout))
        assert figures[-1]["loss"] < 20


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_exports_with_a_certificate_of_the_merge(
    home: Path, tmp_path: Path, dtype: str | None
) -> None:
    folder = converted(home / "tuned", tmp_path / "hf", "hf", dtype=dtype)
    parity = json.loads((folder / "parity.json").read_text())
    assert parity["passed"] and parity["merge"]["passed"]
    assert parity["merge"]["reference"] == "mtk with its adapters apart"
    assert parity["merge"]["max_abs_logit_error"] <= parity["merge"]["limit"] <= 1e-4
    if dtype is None:
        found, expected = open_model(folder).model(TOKENS), open_model(home / "tuned").model(TOKENS)
        torch.testing.assert_close(found, expected)


def test_becomes_a_whole_native_checkpoint(home: Path, tmp_path: Path) -> None:
    folder = converted(home / "tuned", tmp_path / "whole", "native")
    found = load_model(folder).model(TOKENS)
    torch.testing.assert_close(found, open_model(home / "tuned").model(TOKENS))
    assert json.loads((folder / "parity.json").read_text())["passed"]


def test_a_wrong_merge_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unscaled(weight: Any, a: Any, b: Any, scale: float) -> Any:
        return merged(weight, a, b, 1.0 + 0 * scale)

    monkeypatch.setattr(mtk.convert.adapters, "merged", unscaled)
    with pytest.raises(GateError, match="adapters apart differ"):
        converted(home / "tuned", tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()


def test_is_evaluated_merged(home: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 5)
    figures = []
    converted(home / "tuned", tmp_path / "whole", "native")
    for load in (home / "tuned", tmp_path / "whole"):
        wanted = make(
            EvaluateConfig,
            load=str(load),
            task="WIKITEXT103",
            detokenizer="none",
            valid_data=[str(tmp_path / "text.txt")],
            output=str(tmp_path / f"out-{load.name}"),
        )
        figures.append(evaluate.run(wanted, QUIET).metrics["loss"])
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)


def test_the_base_may_move_along_but_not_change(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "copy")
    expected = open_model(home / "tuned").model(TOKENS)
    assert torch.equal(open_model(tmp_path / "copy" / "tuned").model(TOKENS), expected)
    lone = shutil.copytree(home / "tuned", tmp_path / "lone")
    assert torch.equal(open_model(lone).model(TOKENS), expected)  # by its full path
    record = lone / "step_00000004" / "base.json"
    reference = json.loads(record.read_text())
    for changed, words in (
        ({"path": str(tmp_path / "gone")}, "nothing there"),
        ({"path": str(home / "tuned")}, "digest"),
        ({"version": 9}, "version 9"),
    ):
        record.write_text(json.dumps(reference | {"relative": "nowhere"} | changed))
        with pytest.raises(CheckpointError, match=words):
            mtk.convert.adapters.find_base(record.parent)


def test_the_base_may_be_a_foreign_directory(home: Path, tmp_path: Path) -> None:
    """One that mtk did not write is known by the digests of its files."""
    folder = converted(home / "base", tmp_path / "hf", "hf")
    (folder / "artifact.json").unlink()
    wanted = config(home, tmp_path / "run", pretrained_checkpoint=str(folder))
    run(wanted, QUIET)
    found = open_model(tmp_path / "run").model(TOKENS)
    torch.testing.assert_close(found, open_model(home / "tuned").model(TOKENS))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"note": "changed"}))
    with pytest.raises(CheckpointError, match="holds adapters of the model with digest"):
        open_model(tmp_path / "run")


def test_finetuning_goes_on_from_merged_adapters(home: Path, tmp_path: Path) -> None:
    wanted = options(
        "sft",
        home / "tuned",
        tmp_path,
        train_data=[str(home / "talk.jsonl")],
        train_iters=1,
        lr=1e-30,
    )
    artifact = run(wanted, QUIET)
    torch.testing.assert_close(
        open_model(artifact.folder).model(TOKENS), open_model(home / "tuned").model(TOKENS)
    )
