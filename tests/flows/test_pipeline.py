"""Planning a pipeline and running it without Prefect."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from flows.attempts import curable
from flows.pipeline import Pipeline, plan_pipeline
from flows.runner import run_plain
from flows.steps import registered_stages
from mtk.config import Layer
from mtk.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    GateError,
    Interrupted,
    WorkerError,
)
from mtk.log import Reporter
from mtk.session import Session
from tests.flows.fake_stages import fake_stages

STEPS = list(fake_stages())
FILE = """
flow: {work: work, leave_out: [serve], retry_delay: 0}
tokenizer: {vocab_size: 64}
pretrain: {train_iters: 3}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flow.yaml").write_text(FILE)
    return tmp_path


def plan(**overrides: object) -> Pipeline:
    layer = Layer("--set", {name.replace("__", "."): value for name, value in overrides.items()})
    return plan_pipeline("flow.yaml", fake_stages(), overrides=layer)


def session() -> Session:
    return Session(Reporter(quiet=True))


def ran() -> list[str]:
    return Path("ran.txt").read_text().split()


def fail(stage: str, how: str, times: int = 1) -> None:
    Path("fail.json").write_text(json.dumps({"stage": stage, "how": how, "times": times}))


def test_outputs_become_inputs_and_follow_a_moved_output() -> None:
    configs = {step.name: step.config for step in plan(tokenizer__output="elsewhere").steps}
    assert list(configs) == STEPS
    assert configs["preprocess"].tokenizer_model == "elsewhere"
    assert configs["pretrain"].data_path == ("work/data/corpus_text_document",)
    assert configs["evaluate"].load == "work/checkpoints"
    assert configs["tokenizer"].vocab_size == 64


def test_finetuning_is_a_step_where_the_file_has_a_section_for_it(folder: Path) -> None:
    options = "{task: sft, train_data: [talk.jsonl], chat_template: plain, epochs: 1, lr: 1e-4}"
    (folder / "flow.yaml").write_text(f"{FILE}finetune: {options}\n")
    stages = {**fake_stages(), "finetune": registered_stages()["finetune"]}
    configs = {step.name: step.config for step in plan_pipeline("flow.yaml", stages).steps}
    assert list(configs) == [*STEPS[:4], "finetune", *STEPS[4:]]
    assert configs["finetune"].pretrained_checkpoint == "work/checkpoints"
    assert configs["finetune"].checkpoint.save == "work/finetuned"
    for name in ("evaluate", "cloze", "convert", "quantize"):
        assert configs[name].load == "work/finetuned"


def test_own_corpus_replaces_the_demo_corpus() -> None:
    pipeline = plan(flow__input=["a.jsonl", "b.jsonl"], flow__heldout=["h.txt"])
    assert [step.name for step in pipeline.steps] == [s for s in STEPS[1:] if s != "cloze"]
    assert pipeline.steps[-1].config.valid_data == ("h.txt",)
    assert pipeline.steps[0].config.input == ("a.jsonl", "b.jsonl")


def test_all_problems_of_all_sections_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(tokenizer__vocab_sise=3, pretrain__train_iters="many", quantize__formt="x")
    keys = {problem.key for problem in caught.value.problems}
    assert keys == {"tokenizer.vocab_sise", "pretrain.train_iters", "quantize.formt"}
    assert "Did you mean vocab_size?" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"tokenise__type": "bpe"}, "Did you mean tokenizer?"),
        ({"flow__input": ["a.jsonl"]}, "is needed by evaluate and quantize"),
        ({"flow__cloze": ["a.jsonl"]}, "belongs to flow.input"),
        ({"flow__leave_out": ["pretrain"]}, "can be left out"),
        ({"flow__leave_out": ["convert"]}, "is made by step convert"),
        ({"check__source": "hf"}, "must be one of"),
        ({"check__tokens_to_generate": 0}, "at least 1"),
        ({"flow__retries": -1}, "must not be negative"),
        ({"tokenizer": 3}, "must be a mapping"),
    ],
)
def test_mistakes_in_the_file_name_the_remedy(overrides: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=r".") as caught:
        plan(**overrides)
    assert words in str(caught.value)


def test_a_second_run_skips_everything_and_says_so() -> None:
    first = run_plain(plan(), session())
    assert [outcome.skipped for outcome in first] == [False] * 8
    second = run_plain(plan(), session())
    assert [outcome.skipped for outcome in second] == [True] * 8
    assert [o.digest for o in first] == [o.digest for o in second]
    assert ran() == STEPS
    report = Path("work/report.md").read_text()
    assert "8 of 8 steps complete, 0 ran now, 8 skipped" in report
    assert "![loss](checkpoints/step_00000003/loss.png)" in report


@pytest.mark.parametrize("stage", STEPS)
@pytest.mark.parametrize(
    ("how", "error"), [("data", DataError), ("bug", ZeroDivisionError), ("sigterm", Interrupted)]
)
def test_a_failed_stage_stops_the_run_and_the_next_run_continues(
    stage: str, how: str, error: type[Exception]
) -> None:
    fail(stage, how)
    with pytest.raises(error):
        run_plain(plan(), session())
    assert ran() == STEPS[: STEPS.index(stage)] if STEPS.index(stage) else True
    report = Path("work/report.md").read_text()
    assert "# Failed" in report and f"| {stage} | not complete |" in report
    outcomes = run_plain(plan(), session())
    assert [outcome.skipped for outcome in outcomes] == [
        STEPS.index(name) < STEPS.index(stage) for name in STEPS
    ]
    assert ran() == STEPS


def test_only_curable_errors_are_tried_again() -> None:
    fail("pretrain", "worker", times=2)
    assert len(run_plain(plan(), session())) == 8
    fail("evaluate", "worker", times=3)
    with pytest.raises(WorkerError):
        run_plain(plan(pretrain__train_iters=3, evaluate__task="other"), session())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (WorkerError("x"), True),
        (ConnectionResetError(), True),
        (OSError(5, "EIO"), True),
        (OSError(28, "ENOSPC"), False),
        (ConfigError("x"), False),
        (DataError("x"), False),
        (GateError("x"), False),
        (ArtifactError("x"), False),
        (Interrupted("x"), False),
        (ZeroDivisionError(), False),
    ],
)
def test_what_is_curable(error: Exception, expected: bool) -> None:
    assert curable(error) is expected


def test_machines_are_told_every_step() -> None:
    out = io.StringIO()
    run_plain(plan(), Session(Reporter(json_lines=True, quiet=True, stdout=out)))
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    finished = [event for event in events if event["event"] == "step_finished"]
    assert [event["step"] for event in finished] == STEPS
    assert all(len(event["digest"]) == 64 for event in finished)
