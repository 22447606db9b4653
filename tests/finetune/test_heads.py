"""Heads of RACE, MNLI and QQP: they learn, on any number of ranks, and are scored exactly once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.artifacts import open_artifact
from mtk.checkpoint import load_model, read_model_config, read_tensors
from mtk.config import make
from mtk.config.convert import ConvertConfig
from mtk.config.evaluate import EvaluateConfig
from mtk.config.heads import TASKS
from mtk.config.pretrain import PretrainConfig
from mtk.convert.open_model import open_model
from mtk.errors import CheckpointError, ConfigError, DataError
from mtk.evaluation.classification import ClassificationData
from mtk.evaluation.task_files import read_task, unique_names
from mtk.log import Reporter
from mtk.session import Session
from stages import convert, evaluate
from stages.finetune import run
from tests.convert.models import gpt2_config, save_native
from tests.finetune.runs import (
    LAYOUTS,
    QUIET,
    assert_close,
    figures,
    layouts,
    options,
    train,
    weight_files,
)
from tests.finetune.tasks import mnli, qqp, race, save_bert

SIZES = {"RACE": 120, "MNLI": 240, "QQP": 160}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    save_bert(folder / "bert")
    save_bert(folder / "bare", tokenizer=False)
    save_bert(folder / "poolerless", binary=False)
    (folder / "test.tsv").write_text("id\tquestion1\tquestion2\n0\ta\tb\n1\tc\td\n")
    save_bert(folder / "narrow", vocab_size=12)
    save_native(folder / "gpt", gpt2_config())
    race(folder / "RACE" / "train" / "middle", SIZES["RACE"], 1)
    race(folder / "RACE" / "dev" / "middle", 42, 2)
    race(folder / "RACE" / "dev" / "high", 20, 3)
    mnli(folder / "MNLI" / "train.tsv", SIZES["MNLI"], 1)
    mnli(folder / "MNLI" / "dev_matched.tsv", 45, 2)
    qqp(folder / "QQP" / "train.tsv", SIZES["QQP"], 1)
    qqp(folder / "QQP" / "dev.tsv", 37, 2)
    return folder


def files(home: Path, task: str) -> dict[str, Any]:
    names = {
        "RACE": (["train/middle"], ["dev/middle", "dev/high"]),
        "MNLI": (["train.tsv"], ["dev_matched.tsv"]),
        "QQP": (["train.tsv"], ["dev.tsv"]),
    }[task]
    train, valid = ([str(home / task / name) for name in some] for some in names)
    return {"train_data": train, "valid_data": valid}


def config(home: Path, task: str, save: Path, base: str = "bert", **changes: Any) -> Any:
    own = {**files(home, task), "micro_batch_size": 2, "global_batch_size": 4}
    return options(task, home / base, save, **{**own, **changes})


LEARN = {"train_iters": None, "epochs": 4, "lr": 2e-3, "global_batch_size": 8}


@pytest.fixture(scope="module")
def tuned(home: Path) -> dict[str, Path]:
    """Each task learnt, in one process."""
    found = {}
    for task in SIZES:
        found[task] = home / f"tuned-{task}"
        run(config(home, task, found[task], **LEARN), QUIET)
    return found


@pytest.mark.parametrize("task", SIZES)
def test_learns_a_separable_set(tuned: dict[str, Path], task: str) -> None:
    evaluations = [r for r in figures(tuned[task]) if r["event"] == "eval"]
    assert len(evaluations) == LEARN["epochs"]  # one after each
    assert evaluations[-1]["accuracy"] > 0.95
    best = json.loads((tuned[task] / "best.json").read_text())
    assert best["accuracy"] == max(r["accuracy"] for r in evaluations)
    assert (tuned[task] / f"step_{best['step']:08}").is_dir()


@pytest.mark.parametrize("task", SIZES)
def test_predictions_list_every_sample_once(home: Path, tuned: dict[str, Path], task: str) -> None:
    last = figures(tuned[task])[-1]
    names = {"RACE": ["dev-middle", "dev-high"], "MNLI": ["dev-matched"], "QQP": ["dev"]}[task]
    right = total = 0
    for name in names:
        text = (tuned[task] / "predictions" / f"{name}.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        assert [line["uid"] for line in lines] == list(range(len(lines)))
        hits = sum(line["label"] == line["predicted"] for line in lines)
        assert last[f"accuracy.{name}"] == hits / len(lines)
        for line in lines:
            assert sum(line["probabilities"]) == pytest.approx(1.0)
            assert line["probabilities"].index(max(line["probabilities"])) == line["predicted"]
        right, total = right + hits, total + len(lines)
    assert (last["samples"], last["accuracy"]) == (total, right / total)


@pytest.mark.parametrize("task", SIZES)
@pytest.mark.parametrize("nproc", [1, 2])
def test_mtk_evaluate_finds_the_same(
    home: Path, tuned: dict[str, Path], tmp_path: Path, task: str, nproc: int
) -> None:
    artifact = evaluate.run(evaluation(home, task, tuned[task], tmp_path, nproc=nproc), QUIET)
    last = figures(tuned[task])[-1]
    assert artifact.metrics["accuracy"] == last["accuracy"]
    assert artifact.metrics["total"] == last["samples"]
    assert artifact.metrics["loss"] == pytest.approx(last["loss"], rel=1e-5)
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    for name in {item["data"] for item in items}:
        own = [item for item in items if item["data"] == name]
        text = (tuned[task] / "predictions" / f"{name}.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        assert [i["predicted"] for i in own] == [line["predicted"] for line in lines]
        assert [i["uid"] for i in own] == [line["uid"] for line in lines]
        assert artifact.metrics[f"of.{name}.accuracy"] == last[f"accuracy.{name}"]


def evaluation(home: Path, task: str, load: Path, output: Path, **changes: Any) -> EvaluateConfig:
    values = {"task": task, "load": str(load), "output": str(output), "device": "cpu"}
    data = files(home, task)["valid_data"]
    return make(EvaluateConfig, **{**values, "valid_data": data, **changes})


def test_mtk_evaluate_refuses_other_models(
    home: Path, tuned: dict[str, Path], tmp_path: Path
) -> None:
    for load, task, words in (
        (home / "bert", "MNLI", "has no head.*mtk finetune --task MNLI"),
        (home / "gpt", "MNLI", "has no head"),
        (tuned["MNLI"], "QQP", "has the head of MNLI"),
    ):
        with pytest.raises(ConfigError, match=words):
            evaluate.run(evaluation(home, task, load, tmp_path / "out"), QUIET)
    with pytest.raises(ConfigError, match="exceeds the 24 positions"):
        wanted = evaluation(home, "MNLI", tuned["MNLI"], tmp_path / "out", seq_length=99)
        evaluate.run(wanted, QUIET)
    with pytest.raises(ConfigError, match="belongs to"):
        evaluation(home, "MNLI", tuned["MNLI"], tmp_path / "out", strict_lambada=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ["RACE", pytest.param("MNLI", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", layouts("tp2-sp", "pp2", "dp2-full", without="cp"))
def test_every_figure_is_that_of_one_process(
    home: Path, tmp_path: Path, task: str, name: str
) -> None:
    """Accuracy too: each sample counts once on any number of ranks."""
    one = train(config(home, task, tmp_path / "one", lr=1e-3))
    other = train(config(home, task, tmp_path / name, lr=1e-3, nproc=2, **LAYOUTS[name]))
    assert_close(other, one, 1e-5)


def test_ranks_agree_about_dropout(home: Path, tmp_path: Path) -> None:
    changes = {"hidden_dropout": 0.2, "replica_check_interval": 1, **LAYOUTS["tp2-sp"]}
    train(config(home, "MNLI", tmp_path, nproc=2, **changes))


def test_the_head_is_part_of_the_model(home: Path, tuned: dict[str, Path]) -> None:
    model = read_model_config(tuned["MNLI"] / "step_00000120")
    assert (model.task_head, model.num_classes) == ("MNLI", 3)
    names = set(read_tensors(tuned["MNLI"] / "step_00000120", "model"))
    assert "classifier.dense.weight" in names and "pooler.dense.weight" in names
    assert not any(name.startswith(("transform", "output_bias", "order")) for name in names)
    assert load_model(tuned["MNLI"]).config == model


def test_a_head_is_never_taken_for_something_else(
    home: Path, tuned: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"has the head of MNLI.*--task MNLI"):
        run(config(home, "QQP", tmp_path / "a", base="tuned-MNLI"), QUIET)
    with pytest.raises(ConfigError, match="belongs to mtk finetune"):
        make(
            PretrainConfig,
            **{"family": "bert", "num_layers": 1, "hidden_size": 8, "num_attention_heads": 1},
            seq_length=8,
            mock_data=True,
            vocab_size=9,
            train_iters=1,
            lr=1.0,
            save="x",
            **{"model.task_head": "RACE", "model.bert_binary_head": False},
        )


@pytest.mark.parametrize("task", SIZES)
def test_a_head_goes_to_hugging_face(
    home: Path, tuned: dict[str, Path], tmp_path: Path, task: str
) -> None:
    """transformers computes the same on the task's samples, and mtk evaluates the export."""
    transformers = pytest.importorskip("transformers")
    wanted = make(ConvertConfig, load=str(tuned[task]), save=str(tmp_path / "hf"), to="hf")
    exported = convert.run(wanted, QUIET)
    kind = "MultipleChoice" if task == "RACE" else "SequenceClassification"
    model, report = getattr(transformers, f"MegatronBertFor{kind}").from_pretrained(
        exported.path, output_loading_info=True
    )
    assert not any(report.values())
    if task == "MNLI":
        assert model.config.id2label[1] == "entailment"
    evaluate.run(evaluation(home, task, exported.path, tmp_path / "score"), QUIET)
    lines = (tmp_path / "score" / "items.jsonl").read_text().splitlines()
    opened = open_model(tuned[task])
    path = files(home, task)["valid_data"][0]
    data = read_task(TASKS[task], path, opened.tokenizer, opened.config.seq_length, pytest.fail)
    for k in range(8):
        sample = data[k]
        mask = torch.from_numpy(sample.mask)
        text, types = torch.from_numpy(sample.text), torch.from_numpy(sample.types) * mask
        rows = [x[None] if task == "RACE" else x for x in (text, types, mask)]
        with torch.no_grad():
            found = model(rows[0], token_type_ids=rows[1], attention_mask=rows[2]).logits
        expected = json.loads(lines[k])["probabilities"]
        assert found.flatten().softmax(-1).tolist() == pytest.approx(expected, abs=1e-5)


def test_goes_on_with_the_same_head(home: Path, tuned: dict[str, Path], tmp_path: Path) -> None:
    changes = {"train_iters": 1, "lr": 1e-30}
    run(config(home, "MNLI", tmp_path, base="tuned-MNLI", **changes), QUIET)
    assert figures(tmp_path)[-1]["accuracy"] == figures(tuned["MNLI"])[-1]["accuracy"]


def test_begins_from_a_hugging_face_directory(home: Path, tmp_path: Path) -> None:
    wanted = make(ConvertConfig, load=str(home / "bert"), save=str(tmp_path / "hf"), to="hf")
    convert.run(wanted, QUIET)
    own = {"train_iters": 3, **LAYOUTS["dp2"]}
    native = train(config(home, "MNLI", tmp_path / "native", **own))
    foreign = train(config(home, "MNLI", tmp_path / "foreign", base=tmp_path / "hf", **own))
    assert_close(foreign, native, 1e-5)


def test_a_missing_pooler_begins_anew(home: Path, tmp_path: Path) -> None:
    told: list[str] = []

    class Listener(Reporter):
        def warn(self, message: str) -> None:
            told.append(message)

    wanted = config(home, "QQP", tmp_path, base="poolerless", train_iters=1)
    artifact = run(wanted, Session(Listener(quiet=True)))
    assert told == [f"{home / 'poolerless'} has no pooler: it begins anew"]
    assert "pooler.dense.weight" in read_tensors(artifact.folder, "model")


def test_adapters_and_a_head(home: Path, tmp_path: Path) -> None:
    from mtk.convert.open_model import open_model

    lora = {"lora_rank": 4, "lora_targets": "all", **LEARN, "lr": 5e-3, "epochs": 6}
    artifact = run(config(home, "QQP", tmp_path, **lora), QUIET)
    assert artifact.metrics["eval"]["accuracy"] > 0.95
    names = set(read_tensors(artifact.folder, "model"))
    assert all(".lora." in n or n.startswith(("pooler", "classifier")) for n in names)
    assert open_model(artifact.folder).config.task_head == "QQP"


def test_resumes_bit_for_bit_in_the_middle_of_an_epoch(home: Path, tmp_path: Path) -> None:
    changes = {"train_iters": 6, "save_interval": 3, "keep_checkpoints": 0, "hidden_dropout": 0.1}
    for name in ("straight", "stopped"):
        run(config(home, "RACE", tmp_path / name, **changes), QUIET)
    shutil.rmtree(tmp_path / "stopped" / "step_00000006")
    run(config(home, "RACE", tmp_path / "stopped", **changes), QUIET)
    assert weight_files(tmp_path / "straight") == weight_files(tmp_path / "stopped")
    artifact = open_artifact(tmp_path / "stopped" / "step_00000006")
    assert artifact.stage == "finetune"


@pytest.mark.parametrize(
    ("base", "task", "changes", "error", "words"),
    [
        ("gpt", "MNLI", {}, ConfigError, "is of family gpt"),
        ("bare", "MNLI", {}, CheckpointError, "has no tokenizer"),
        ("bert", "MNLI", {"train_data": ["no.tsv"]}, DataError, "is not a file"),
        ("bert", "RACE", {"train_data": ["no"]}, DataError, "is not a folder"),
        (
            "bert",
            "QQP",
            {"train_data": ["test.tsv"]},
            DataError,
            "test.tsv have the label 0.*not pub",
        ),
        ("bert", "MNLI", {"eval_iters": 3}, ConfigError, "that of all held-out samples"),
        ("bert", "MNLI", {"chat_template": "plain"}, ConfigError, "belongs to --task sft"),
        ("bert", "MNLI", {"train_iters": None, "train_tokens": 9}, ConfigError, "in tokens"),
        ("bert", "MNLI", {"seq_length": 3}, ConfigError, "must be at least 5"),
        ("bert", "MNLI", {"lora_rank": 33}, ConfigError, "lora_rank = 33: exceeds"),
        ("bert", "sft", {}, ConfigError, "token by token"),
    ],
)
def test_refusals_leave_nothing(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    task: str,
    changes: Any,
    error: Any,
    words: str,
) -> None:
    own = files(home, "MNLI" if task == "sft" else task)
    monkeypatch.chdir(home)
    with pytest.raises(error, match=words):
        run(options(task, home / base, tmp_path / "save", **{**own, **changes}), QUIET)
    assert not (tmp_path / "save").exists()


def test_ids_that_the_model_has_no_row_for(home: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.tsv:\d+ holds id \d+, but the model has 12 ids"):
        run(config(home, "QQP", tmp_path / "save", base="narrow"), QUIET)


def test_names_of_held_out_data_are_told_apart() -> None:
    def named(name: str) -> ClassificationData:
        data = ClassificationData.__new__(ClassificationData)
        data.name = name
        return data

    found = unique_names([named(n) for n in ("dev", "dev", "", "../../etc", "")])
    assert found == ["dev", "dev-no2", "data", "etc", "data-no2"]
