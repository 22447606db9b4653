"""The flow from a crawl to token datasets: wiring, and a run without Prefect."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from flows.catalog import FLOWS
from flows.curate_steps import CURATE_WEB
from flows.pipeline import Pipeline, plan_pipeline
from flows.runner import run_plain
from mtk.artifacts import lineage_lines, open_artifact, verify_lineage
from mtk.config import Layer
from mtk.config.curate_flow import CURATE_STEPS
from mtk.errors import ConfigError
from tests.curation.commands import corpus
from tests.curation.inputs import QUIET

FILE = """
flow: {work: work, input: [in.jsonl], retry_delay: 0}
clean: {min_tokens: 64}
decontaminate: {evaluation_jsonl: [eval.jsonl]}
tokenizer: {vocab_size: 300}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flow.yaml").write_text(FILE)
    return tmp_path


def plan(**overrides: object) -> Pipeline:
    layer = Layer("--set", {name.replace("__", "."): value for name, value in overrides.items()})
    return plan_pipeline("flow.yaml", CURATE_WEB.stages(), CURATE_WEB, layer)


def test_each_step_reads_what_the_step_before_wrote() -> None:
    configs = {step.name: step.config for step in plan(clean__output="elsewhere.jsonl").steps}
    assert tuple(configs) == CURATE_STEPS == tuple(step.name for step in CURATE_WEB.steps)
    assert configs["urls"].input == ("in.jsonl",)
    assert configs["clean"].input == (configs["urls"].output,)
    assert configs["duplicates"].input == ("elsewhere.jsonl",)
    assert (
        configs["preprocess"].input == configs["tokenizer"].input == ("work/decontaminate.jsonl",)
    )
    assert configs["preprocess"].tokenizer.tokenizer_model == "work/tokenizer"
    assert configs["clean"].clean.min_tokens == 64


def test_steps_that_are_not_asked_for(folder: Path) -> None:
    (folder / "flow.yaml").write_text("flow: {input: [a.txt], leave_out: [urls, preprocess]}")
    steps = plan().steps
    assert [step.name for step in steps] == ["clean", "duplicates"]
    assert steps[0].config.input == ("a.txt",)


def test_mistakes_in_the_file() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(clean__min_tokens="many", duplicates__bnads=3, decontaminate__evaluation_jsonl=[])
    keys = {problem.key for problem in caught.value.problems}
    assert {"clean.clean.min_tokens", "duplicates.bnads"} <= keys and len(keys) == 3
    with pytest.raises(ConfigError, match="Did you mean urls"):
        plan(flow__leave_out=["url"])
    with pytest.raises(ConfigError, match="no such section"):
        plan(check__source="hf_model")


def test_a_run_and_its_repetition(folder: Path) -> None:
    corpus(folder)
    first = run_plain(plan(), QUIET)
    assert [outcome.name for outcome in first] == list(CURATE_STEPS)
    assert not any(outcome.skipped for outcome in first)
    assert all(outcome.skipped for outcome in run_plain(plan(), QUIET))
    dataset = open_artifact("work/data/corpus", "dataset")
    assert dataset.metrics["keys"]["text"]["documents"] == first[3].metrics["records_written"]
    verify_lineage(dataset)
    assert any("in.jsonl" in line for line in lineage_lines(dataset))


def test_flows_of_the_catalog_are_there() -> None:
    """Without importing Prefect, which reads its environment then."""
    for entry in FLOWS.values():
        for name in (entry.chain, entry.function):
            module, _, attribute = name.partition(":")
            source = find_spec(module)
            assert source is not None and source.origin is not None
            assert attribute in Path(source.origin).read_text()
