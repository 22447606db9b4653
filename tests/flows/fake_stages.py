"""Stages that take no time, with the options and outputs of the real ones.

What a stage does wrong is told by a file ``fail.json`` in the current folder:
``{"stage": name, "how": "data" | "worker" | "bug" | "sigterm" | "sigkill", "times": n}``.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtk.artifacts import (
    Artifact,
    InputRecord,
    completed,
    input_file,
    open_artifact,
    publish_directory,
    publish_prefix,
)
from mtk.config import group, option
from mtk.errors import DataError, WorkerError
from mtk.session import Session
from stages.registry import Stage


@dataclass(frozen=True, kw_only=True)
class Corpus:
    output: str = option(help="Output.")
    heldout: bool = option(False, help="Held out.")
    cloze: bool = option(False, help="Cloze.")

    @property
    def prefix(self) -> str:
        return self.output.removesuffix(".jsonl")


@dataclass(frozen=True, kw_only=True)
class Files:
    input: tuple[str, ...] = option(help="Input.")
    output: str = option(help="Output.")
    vocab_size: int = option(100, help="Size.")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    input: tuple[str, ...] = option(help="Input.")
    output_prefix: str = option(help="Output.")
    json_keys: tuple[str, ...] = option(("text",), help="Keys.")
    split_sentences: bool = option(False, help="Sentences.")
    append_eod: bool = option(False, help="EOD.")
    tokenizer_model: str = option(help="Model.")

    @property
    def level(self) -> str:
        return "sentence" if self.split_sentences else "document"


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    save: str | None = option(None, help="Folder.")


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    recipe: str | None = option(None, help="Recipe.")
    data_path: tuple[str, ...] = option((), help="Data.")
    train_iters: int = option(3, help="Steps.")
    checkpoint: Checkpoints = group(Checkpoints, title="Checkpoints")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    load: str = option(help="Model.")
    task: str = option(help="Task.")
    valid_data: tuple[str, ...] = option(help="Data.")
    detokenizer: str = option("auto", help="Rules.")
    output: str = option(help="Output.")


@dataclass(frozen=True, kw_only=True)
class Convert:
    load: str = option(help="Model.")
    save: str = option(help="Output.")
    to: str = option("hf", help="Target.")


@dataclass(frozen=True, kw_only=True)
class Quantize:
    load: str = option(help="Model.")
    save: str = option(help="Output.")
    format: str = option("int8_wo", help="Format.")
    valid_data: tuple[str, ...] = option((), help="Data.")


def misbehave(name: str) -> None:
    plan = Path("fail.json")
    wanted = json.loads(plan.read_text()) if plan.exists() else {}
    if wanted.get("stage") != name or wanted["times"] == 0:
        return
    plan.write_text(json.dumps({**wanted, "times": wanted["times"] - 1}))
    if wanted["how"] == "data":
        raise DataError("corpus.jsonl, line 3: not JSON")
    if wanted["how"] == "worker":
        raise WorkerError("rank 1 was killed")
    if wanted["how"] == "bug":
        raise ZeroDivisionError("a bug")
    os.kill(os.getpid(), signal.SIGTERM if wanted["how"] == "sigterm" else signal.SIGKILL)


def note_ran(name: str) -> None:
    with Path("ran.txt").open("a") as file:
        file.write(f"{name}\n")


def _directory(
    name: str, kind: str, config: Any, path: str, inputs: list[InputRecord], files: dict[str, str]
) -> Artifact:
    done = completed(path, stage=name, config=config, inputs=inputs)
    if done is not None:
        return done
    misbehave(name)
    note_ran(name)
    with publish_directory(path, kind=kind, stage=name, config=config, inputs=inputs) as out:
        for file, text in files.items():
            (out.folder / file).write_text(text)
        out.metrics["size"] = sum(map(len, files.values()))
    return out.artifact


def run_corpus(config: Corpus, session: Session) -> Artifact:
    done = completed(config.output, stage="corpus", config=config, inputs=[])
    if done is not None:
        return done
    misbehave("corpus")
    note_ran("corpus")
    stem = config.output.removesuffix(".jsonl")
    with publish_prefix(stem, kind="corpus", stage="corpus", config=config) as out:
        (out.folder / Path(config.output).name).write_text('{"text": "a"}\n' * 40)
    return out.artifact


def _roles(role: str, paths: tuple[str, ...]) -> list[InputRecord]:
    return [input_file(path, role) for path in paths]


def run_tokenizer(config: Files, session: Session) -> Artifact:
    inputs = _roles("corpus", config.input)
    return _directory("tokenizer", "tokenizer", config, config.output, inputs, {"t.json": "{}"})


def run_preprocess(config: Preprocess, session: Session) -> Artifact:
    inputs = _roles("corpus", config.input)
    inputs.append(open_artifact(config.tokenizer_model, "tokenizer").as_input("tokenizer"))
    prefix = f"{config.output_prefix}_text_document"
    done = completed(prefix, stage="preprocess", config=config, inputs=inputs)
    if done is not None:
        return done
    misbehave("preprocess")
    note_ran("preprocess")
    with publish_prefix(
        prefix, kind="dataset", stage="preprocess", config=config, inputs=inputs
    ) as out:
        (out.folder / f"{Path(prefix).name}.bin").write_text("0")
    return out.artifact


def run_pretrain(config: Pretrain, session: Session) -> Artifact:
    inputs = [open_artifact(config.data_path[0], "dataset").as_input("data")]
    path = f"{config.checkpoint.save}/step_00000003"
    return _directory("pretrain", "checkpoint", config, path, inputs, {"loss.png": "p"})


def _model(path: str) -> list[InputRecord]:
    return [open_artifact(f"{path}/step_00000003", "checkpoint").as_input("model")]


def run_evaluate(config: Evaluate, session: Session) -> Artifact:
    inputs = _model(config.load)
    name = "cloze" if config.task == "LAMBADA" else "evaluate"
    return _directory(name, "evaluation", config, config.output, inputs, {"e.json": "{}"})


def run_convert(config: Convert, session: Session) -> Artifact:
    files = {"config.json": "{}"}
    return _directory("convert", "hf_model", config, config.save, _model(config.load), files)


def run_quantize(config: Quantize, session: Session) -> Artifact:
    files = {"config.json": "{}"}
    inputs = _model(config.load)
    return _directory("quantize", "quantized_model", config, config.save, inputs, files)


def fake_stages() -> dict[str, Stage]:
    """One a step, by step name; the server is never started (leave out ``serve``)."""
    classes = {
        "corpus": "Corpus",
        "tokenizer": "Files",
        "preprocess": "Preprocess",
        "pretrain": "Pretrain",
        "evaluate": "Evaluate",
        "cloze": "Evaluate",
        "convert": "Convert",
        "quantize": "Quantize",
    }
    functions = {name: name for name in classes} | {"cloze": "evaluate"}
    return {
        name: Stage(name, f"{__name__}:{config}", f"{__name__}:run_{functions[name]}", "Fake.")
        for name, config in classes.items()
    }
