"""The stage on several ranks, without the harness, and what it counts as its inputs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtk.config import make
from mtk.config.evaluate import EvaluateConfig
from mtk.errors import ConfigError, DataError
from mtk.evaluation.lm_eval_tasks import without_examples
from stages.evaluate import run
from tests.convert.models import TEXT, llama, quiet, save_native
from tests.evaluation.stage import evaluate


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_native(tmp_path_factory.mktemp("evaluate") / "model", llama())


@pytest.mark.slow
def test_two_ranks_write_the_same_lines(native: Path, tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    texts = [TEXT[: 30 + n] for n in range(11)]
    data.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    changes: dict[str, Any] = {"task": "LAMBADA", "device": "cpu", "batch_tokens": 60}
    one = evaluate(native, data, tmp_path, output=str(tmp_path / "one"), **changes)
    two = evaluate(native, data, tmp_path, output=str(tmp_path / "two"), nproc=2, **changes)
    assert (one.path / "items.jsonl").read_bytes() == (two.path / "items.jsonl").read_bytes()
    assert one.metrics == two.metrics and one.config_digest == two.config_digest
    again = evaluate(native, data, tmp_path, output=str(tmp_path / "two"), nproc=2, **changes)
    assert again.timings == two.timings


@pytest.mark.slow
def test_an_error_of_a_rank_is_the_command_s(native: Path, tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "one two"}\n{"text": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        evaluate(native, data, tmp_path, device="cpu", nproc=2)
    assert not (tmp_path / "out").exists()


def test_an_absent_harness_is_told(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = make(EvaluateConfig, load=str(native), task="lm-eval:x", output=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"mtk\[eval\]"):
        run(config, quiet())


def test_files_of_harness_tasks_belong_to_the_digest(tmp_path: Path) -> None:
    from mtk.evaluation.lm_eval_inputs import harness_inputs

    def inputs(text: str) -> list[str]:
        (tmp_path / "a.yaml").write_text(text)
        config = make(
            EvaluateConfig, load="x", task="lm-eval:a", output="y", lm_eval_tasks=str(tmp_path)
        )
        return [Path(record.path).name for record in harness_inputs(config)]

    with pytest.raises(DataError, match="no task file"):
        make_config = {"load": "x", "task": "lm-eval:a", "output": "y"}
        harness_inputs(make(EvaluateConfig, **make_config, lm_eval_tasks=str(tmp_path)))
    (tmp_path / "b.py").write_text("raise SystemExit")
    (tmp_path / "test.jsonl").write_text("{}")
    named = "dataset_kwargs:\n  data_files:\n    test: [{name}]\n"
    plain = "task: a\nprocess_docs: !function b.f\n"
    assert inputs(plain) == ["a.yaml", "b.py"]
    assert inputs(plain + named.format(name="test.jsonl")) == ["a.yaml", "b.py", "test.jsonl"]
    with pytest.raises(DataError, match=r"none\.jsonl, which does not exist"):
        inputs(plain + named.format(name="none.jsonl"))
    with pytest.raises(DataError, match="is not a task file"):
        inputs("task: [a")


def test_examples_that_a_task_does_not_allow_are_told() -> None:
    tasks = {
        name: SimpleNamespace(get_config={"num_fewshot": shots}.get)
        for name, shots in (("none", 0), ("own", 3))
    }
    assert without_examples(tasks, 3) == ["none"]
    assert without_examples(tasks, None) == without_examples(tasks, 0) == []
