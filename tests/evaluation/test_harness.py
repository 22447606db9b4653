"""Tasks of lm-evaluation-harness: the same numbers as from its own ``hf`` model."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtk.artifacts import Artifact
from mtk.cli.main import main
from mtk.config import make
from mtk.config.evaluate import EvaluateConfig
from mtk.convert.open_model import open_model
from mtk.errors import ConfigError, DataError, GateError
from mtk.evaluation.comparison import compare, read_run
from stages.convert import run as convert
from stages.evaluate import generator, register_with_harness, run
from tests.convert.models import convert_config, gpt2_config, llama, quiet, save_native
from tests.evaluation.harness_tasks import right_passages, sentence, write_jsonl, write_tasks

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is absent")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

MODELS = {"llama": llama(), "gpt2": gpt2_config(seq_length=40)}
ALL = "own_lambada,own_pages,own_choices,own_texts"


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Also in a process where another test has imported the libraries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    out = {}
    for name, config in MODELS.items():
        native = save_native(folder / f"{name}-native", config)
        out[name] = convert(convert_config(native, folder / name), quiet()).path
    return out


@pytest.fixture(scope="module")
def tasks(exported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    right = [text for path in exported.values() for text in right_passages(open_model(path), 5)]
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks", right=right)


def evaluate(model: Path, output: Path, task: str, **changes: Any) -> Artifact:
    values: dict[str, Any] = {"load": str(model), "task": task, "output": str(output)}
    return run(make(EvaluateConfig, **(values | changes)), quiet())


def harness_samples(model: Path, folder: Path, tasks: Path, names: str) -> dict[str, Path]:
    """``lm_eval --model hf --log_samples``: a samples file for each task."""
    from contextlib import chdir

    from lm_eval.evaluator import evaluate as harness
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with chdir(tasks):
            manager = TaskManager(include_path=str(tasks), include_defaults=False)
            loaded = manager.load(names.split(","))
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=0)
        reference = HFLM(pretrained=str(model), device="cpu", batch_size=3, dtype="float32")
        found = harness(lm=reference, task_dict=loaded, bootstrap_iters=0, log_samples=True)
    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.model_name_sanitized = "hf"
    tracker.date_id = "now"
    for name, samples in found["samples"].items():
        tracker.save_results_samples(task_name=name, samples=samples)
    return {name: folder / "hf" / f"samples_{name}_now.jsonl" for name in names.split(",")}


@pytest.fixture(scope="module")
def references(
    exported: dict[str, Path], tasks: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("reference")
    return {
        name: harness_samples(path, folder / name, tasks, ALL) for name, path in exported.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_adapter_gives_what_the_hf_model_gives(
    name: str,
    exported: dict[str, Path],
    tasks: Path,
    references: dict[str, dict[str, Path]],
    tmp_path: Path,
) -> None:
    for task in ALL.split(","):
        artifact = evaluate(
            exported[name], tmp_path / task, f"lm-eval:{task}", lm_eval_tasks=str(tasks)
        )
        found = compare(read_run(artifact.path), read_run(references[name][task]))
        assert found.equal(1e-3), "\n".join(found.lines(5))
        assert found.documents in (8, 12, 34)
        assert task == "own_texts" or found.largest < 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_own_tasks_give_what_the_hf_model_gives(
    name: str,
    exported: dict[str, Path],
    tasks: Path,
    references: dict[str, dict[str, Path]],
    tmp_path: Path,
) -> None:
    lambada = evaluate(
        exported[name],
        tmp_path / "lambada",
        "LAMBADA",
        strict_lambada=True,
        valid_data=str(tasks / "passages.jsonl"),
    )
    found = compare(read_run(lambada.path), read_run(references[name]["own_lambada"]))
    assert found.equal(1e-3), "\n".join(found.lines(5))
    assert found.documents == 34 and found.accuracy is not None
    assert found.accuracy[0] == found.accuracy[1] >= 5 / 34
    pages = evaluate(
        exported[name],
        tmp_path / "pages",
        "WIKITEXT103",
        windows="rolling",
        detokenizer="none",
        valid_data=str(tasks / "pages.jsonl"),
    )
    found = compare(read_run(pages.path), read_run(references[name]["own_pages"]))
    assert found.equal(1e-3), "\n".join(found.lines(5))
    adapter = evaluate(
        exported[name], tmp_path / "adapter", "lm-eval:own_pages", lm_eval_tasks=str(tasks)
    )
    for metric in ("word_perplexity", "bits_per_byte"):
        theirs = adapter.metrics[f"own_pages.{metric}"]
        assert pages.metrics[metric] == pytest.approx(theirs, rel=1e-4)


def with_bos(model: Path, folder: Path) -> Path:
    """The same model with a tokenizer whose template puts BOS in front, as Llama's does."""
    import shutil

    from tokenizers import Tokenizer, processors

    shutil.copytree(model, folder)
    for name in ("artifact.json", "mtk_tokenizer.json"):
        (folder / name).unlink()
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = "A"
    library.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, library.token_to_id(bos))]
    )
    library.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": bos}))
    return folder


def test_a_tokenizer_that_puts_bos_in_front(
    exported: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    model = with_bos(exported["llama"], tmp_path / "model")
    names = "own_lambada,own_pages,own_choices"
    reference = harness_samples(model, tmp_path / "reference", tasks, names)
    for name in names.split(","):
        single = evaluate(model, tmp_path / name, f"lm-eval:{name}", lm_eval_tasks=str(tasks))
        assert json.loads((single.path / "results.json").read_text())["prepend_bos"] is True
        found = compare(read_run(single.path), read_run(reference[name]))
        assert found.equal(1e-3), "\n".join(found.lines(5))
    passages, pages = str(tasks / "passages.jsonl"), str(tasks / "pages.jsonl")
    strict = {"strict_lambada": True, "valid_data": passages}
    rolling = {"windows": "rolling", "detokenizer": "none", "valid_data": pages}
    for bos, same in (("auto", True), ("always", True), ("never", False)):
        lambada = evaluate(model, tmp_path / f"l-{bos}", "LAMBADA", prepend_bos=bos, **strict)
        found = compare(read_run(lambada.path), read_run(reference["own_lambada"]))
        assert found.equal(1e-3) is same
        text = evaluate(model, tmp_path / f"w-{bos}", "WIKITEXT103", prepend_bos=bos, **rolling)
        found = compare(read_run(text.path), read_run(reference["own_pages"]))
        assert found.equal(1e-3) is same


def test_several_tasks_in_one_run_and_its_files(
    exported: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    task = "lm-eval:own_lambada, own_choices"
    artifact = evaluate(exported["llama"], tmp_path / "out", task, lm_eval_tasks=str(tasks))
    results = json.loads((artifact.path / "results.json").read_text())
    assert set(results["figures"]) == {"own_lambada", "own_choices"}
    assert results["harness"]["tasks"]["own_choices"]["questions"]["effective"] == 12
    assert "acc_stderr" in results["figures"]["own_choices"]
    assert {r.role for r in artifact.inputs} == {"model", "task", "data"}
    items = [json.loads(line) for line in (artifact.path / "items.jsonl").read_text().splitlines()]
    assert [i["item"] for i in items] == list(range(46))
    choices = [i for i in items if i["task"] == "own_choices"]
    assert all(len(i["log_likelihoods"]) == len(i["greedy"]) == 4 for i in choices)
    mean = sum(i["metrics"]["acc"] for i in choices) / len(choices)
    assert mean == pytest.approx(results["figures"]["own_choices"]["acc"])
    again = evaluate(exported["llama"], tmp_path / "out", task, lm_eval_tasks=str(tasks))
    assert again.timings == artifact.timings


def test_a_published_task_with_a_file_of_ones_own(
    exported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import random

    generator = random.Random(1)
    questions = [
        {
            "ind": number,
            "activity_label": "Baking",
            "ctx_a": sentence(generator, 2, 6),
            "ctx_b": sentence(generator, 1, 3),
            "endings": [sentence(generator, 1, 4) for _ in range(4)],
            "label": str(number % 4),
        }
        for number in range(6)
    ]
    data = write_jsonl(tmp_path / "hellaswag.jsonl", questions)
    command = ["evaluate", "--load", str(exported["gpt2"]), "--task", "lm-eval:hellaswag"]
    command += ["--valid-data", str(data), "--output", str(tmp_path / "out"), "--json"]
    assert main([*command, "--limit", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    last = json.loads(lines[-1])
    assert all(json.loads(line) for line in lines)
    assert 0 <= last["metrics"]["hellaswag.acc_norm"] <= 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["harness"]["tasks"]["hellaswag"]["questions"] == {"original": 6, "effective": 4}


@pytest.mark.parametrize(
    ("task", "changes", "error", "message"),
    [
        ("lm-eval:own_lambda", {}, ConfigError, "Nearest: own_lambada"),
        ("lm-eval:own_texts", {"seq_length": 12}, ConfigError, "exceed the 12 new tokens"),
        ("lm-eval:hellaswag", {"lm_eval_tasks": None}, DataError, "downloads nothing"),
        ("lm-eval:own_pages", {"valid_data": "pages.txt"}, ConfigError, "one of .jsonl"),
    ],
)
def test_what_cannot_be_run(
    task: str,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    exported: dict[str, Path],
    tasks: Path,
    tmp_path: Path,
) -> None:
    if "valid_data" in changes:
        data = tmp_path / changes["valid_data"]
        data.write_text("x")
        changes = {"valid_data": str(data)}
    with pytest.raises(error, match=message):
        evaluate(
            exported["llama"], tmp_path / "out", task, **({"lm_eval_tasks": str(tasks)} | changes)
        )
    assert not (tmp_path / "out").exists()


def test_settings_of_generation_that_do_not_exist_are_refused() -> None:
    from mtk.evaluation.lm_eval_model import Continuation, continuation

    assert continuation({"until": "x", "max_new_tokens": 3, "do_sample": False}) == Continuation(
        3, ("x",)
    )
    assert continuation({"do_sample": True, "top_k": 5}).temperature == 1.0
    with pytest.raises(ConfigError, match="num_beams"):
        continuation({"num_beams": 4})


def test_texts_of_a_broken_model_are_refused(exported: dict[str, Path]) -> None:
    from mtk.evaluation.lm_eval_model import Continuation

    opened = open_model(exported["llama"])
    opened.model.output_weight.data.fill_(math.nan)
    with pytest.raises(GateError, match=r"NaN.*Nothing was published"):
        generator(opened, 1)([[1, 2]], Continuation(3))


def test_the_harness_knows_the_model_by_name(exported: dict[str, Path], tasks: Path) -> None:
    from contextlib import chdir

    from lm_eval.api.registry import get_model
    from lm_eval.evaluator import evaluate as harness
    from lm_eval.tasks import TaskManager

    register_with_harness()
    register_with_harness()
    model = get_model("mtk").create_from_arg_string(
        f"load={exported['llama']},batch_tokens=100", {"device": "cpu", "batch_size": 2}
    )
    assert model.max_length == 24 and model.eot_token_id == model.prefix_token_id
    for wrong, message in (("max_length=25", "24 positions"), ("dtype=bfloat16", "fp32, bf16")):
        with pytest.raises(ConfigError, match=message):
            get_model("mtk").create_from_arg_string(f"load={exported['llama']},{wrong}")
    with chdir(tasks):
        loaded = TaskManager(include_path=str(tasks), include_defaults=False).load(["own_lambada"])
    loaded["tasks"]["own_lambada"].set_config(key="num_fewshot", value=0)
    found = harness(lm=model, task_dict=loaded, bootstrap_iters=0)
    assert found["results"]["own_lambada"]["sample_len"] == 34
