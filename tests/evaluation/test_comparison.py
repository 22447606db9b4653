"""Two runs line by line, from folders of mtk and from the harness's own files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mtk.artifacts import publish_directory
from mtk.cli.main import main
from mtk.config import make
from mtk.config.evaluate import EvaluateConfig
from mtk.errors import ArtifactError, DataError
from mtk.evaluation.comparison import compare, read_run

LAMBADA = [
    {"item": 0, "log_likelihood": -1.0, "correct": True},
    {"item": 1, "log_likelihood": -2.5, "correct": False},
]
WINDOWS = [
    {"item": 0, "document": 0, "start": 0, "scored": 8, "log_likelihood": -3.0},
    {"item": 1, "document": 0, "start": 8, "scored": 2, "log_likelihood": -1.0},
    {"item": 2, "document": 1, "start": 0, "scored": 4, "log_likelihood": -2.0},
]
CHOICES = [
    {"item": 0, "task": "t", "doc_id": 0, "filter": "none", "log_likelihoods": [-1.0, -2.0],
     "metrics": {"acc": 1.0}},
    {"item": 1, "task": "t", "doc_id": 1, "filter": "none", "log_likelihoods": [-4.0, -3.0],
     "metrics": {"acc": 0.0}},
]  # fmt: skip
TEXTS = [{"item": 0, "task": "g", "doc_id": 0, "filter": "none", "responses": ["42"],
          "metrics": {"exact_match": 1.0}}]  # fmt: skip

CLASSES = [
    {"item": 0, "data": "dev", "uid": 7, "label": 1, "predicted": 2, "correct": False,
     "loss": 1.5, "probabilities": [0.2, 0.22, 0.58]},
    {"item": 1, "data": "dev", "uid": 9, "label": 0, "predicted": 0, "correct": True,
     "loss": 0.25, "probabilities": [0.78, 0.22, 0.0]},
]  # fmt: skip


def run_folder(path: Path, items: list[dict[str, Any]]) -> str:
    config = make(EvaluateConfig, load="x", task="LAMBADA", valid_data="y", output=str(path))
    with publish_directory(path, kind="evaluation", stage="evaluate", config=config) as made:
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (made.folder / "items.jsonl").write_text(lines)
    return str(path)


def samples_file(path: Path, samples: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return str(path)


def sample(number: int, responses: list[Any], arguments: int, **metrics: Any) -> dict[str, Any]:
    gen = {f"arg_{i}": "x" for i in range(arguments)}
    return {
        "doc_id": number,
        "arguments": {"gen_args_0": gen},
        "filtered_resps": responses,
        "filter": "none",
        **metrics,
    }


@pytest.mark.parametrize("items", [LAMBADA, WINDOWS, CHOICES, TEXTS, CLASSES])
def test_a_run_equals_itself(items: list[dict[str, Any]], tmp_path: Path) -> None:
    run = read_run(run_folder(tmp_path / "a", items))
    found = compare(run, run)
    assert found.equal(0.0) and found.largest == 0.0 and not found.only_a


def test_windows_are_added_up_to_documents(tmp_path: Path) -> None:
    other = [
        {"item": 0, "document": 0, "log_likelihood": -4.0},
        {"item": 1, "document": 1, "log_likelihood": -2.25},
    ]
    found = compare(
        read_run(run_folder(tmp_path / "a", WINDOWS)), read_run(run_folder(tmp_path / "b", other))
    )
    assert (found.documents, found.largest) == (2, 0.25)
    assert found.differences[0].key == "1" and found.equal(0.25) and not found.equal(0.2)


@pytest.mark.parametrize(
    ("items", "samples"),
    [
        (
            LAMBADA,
            [
                sample(1, [["-2.5004", "False"]], 2, acc=0.0),
                sample(0, [["-1.0", "True"]], 2, acc=1.0),
            ],
        ),
        (WINDOWS, [sample(0, ["-4.0"], 1), sample(1, ["-2.0"], 1)]),
        (
            CHOICES,
            [
                sample(0, [["-1.0", "True"], ["-2.0", "False"]], 2, acc=1.0),
                sample(1, [["-4.0", "False"], ["-3.0", "False"]], 2, acc=0.0),
            ],
        ),
        (TEXTS, [sample(0, ["42"], 2, exact_match=1.0)]),
    ],
)
def test_the_harness_s_own_files(
    items: list[dict[str, Any]], samples: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = run_folder(tmp_path / "a", items)
    file = samples_file(tmp_path / "samples_x.jsonl", samples)
    assert compare(read_run(folder), read_run(file)).equal(1e-3)


def changed(items: list[dict[str, Any]], number: int, **values: Any) -> list[dict[str, Any]]:
    return [item | (values if n == number else {}) for n, item in enumerate(items)]


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (LAMBADA, changed(LAMBADA, 1, log_likelihood=-2.6), "largest difference 1.000e-01"),
        (LAMBADA, changed(LAMBADA, 1, correct=True), "1 answers differ"),
        (LAMBADA, changed(LAMBADA, 0, log_likelihood=math.nan), "largest difference inf"),
        (LAMBADA, LAMBADA[:1], "only in the first: 1"),
        (CHOICES, changed(CHOICES, 0, log_likelihoods=[-1.0]), "2 and 1 log-likelihoods"),
        (TEXTS, changed(TEXTS, 0, responses=["43"]), "texts differ"),
        (LAMBADA, TEXTS, "1 and 0 log-likelihoods"),
        (CLASSES, changed(CLASSES, 0, predicted=0), "right: 50.0000% and 50.0000%; 1 answers"),
        (CLASSES, changed(CLASSES, 1, loss=0.5), "largest difference 2.500e-01"),
    ],
)
def test_what_differs_is_told_and_refused(
    a: list[dict[str, Any]],
    b: list[dict[str, Any]],
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = [run_folder(tmp_path / name, items) for name, items in (("a", a), ("b", b))]
    assert main(["evaluation", "diff", *folders]) == 5
    assert text in capsys.readouterr().out
    assert main(["evaluation", "diff", *folders, "--json"]) == 5
    for line in capsys.readouterr().out.splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert main(["evaluation", "diff", folders[0], folders[0], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] and found["flipped"] == 0


def test_several_tasks_keep_their_documents_apart(tmp_path: Path) -> None:
    run = read_run(run_folder(tmp_path / "a", CHOICES + TEXTS))
    assert list(run) == ["t/0", "t/1", "g/0"]


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        read_run(tmp_path)
    file = tmp_path / "samples_x.jsonl"
    for content, message in (
        ('{"a": 1}', r"samples_x\.jsonl:1 is no line of an evaluation"),
        ("[1]", "JSON list"),
        ("{", "is not JSON"),
        ('{"doc_id": 0, "log_likelihood": "much"}', "no line of an evaluation"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            read_run(file)
    file.write_bytes(b"\xff")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_run(file)
    folder = run_folder(tmp_path / "a", LAMBADA)
    for wrong in (["--tolerance", "nan"], ["--tolerance", "-1"], ["--top", "-1"]):
        assert main(["evaluation", "diff", folder, folder, *wrong]) == 2
