"""Stage ``evaluate``: score a model on given files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtk.artifacts import Artifact, input_file, publish_directory
from mtk.config.evaluate import EvaluateConfig
from mtk.errors import ConfigError, DataError, GateError, Problem
from mtk.session import Session
from stages.skip import up_to_date

if TYPE_CHECKING:
    from mtk.convert.open_model import OpenedModel
    from mtk.evaluation.documents import Document

FORMAT = {"format": "mtk-evaluation", "version": 1}


def run(config: EvaluateConfig, session: Session | None = None) -> Artifact:
    """Write ``results.json`` (figures with their definitions) and ``items.jsonl``.

    Raises DataError for files that cannot be scored, GateError for a loss that is not
    finite.
    """
    from mtk.convert.source import find_source

    session = session or Session()
    source = find_source(config.load)
    inputs = [*source.inputs(), *(input_file(path, "data") for path in config.valid_data)]
    done = up_to_date(config.output, "evaluate", config, inputs, session)
    if done is not None:
        return done
    with publish_directory(
        config.output,
        kind="evaluation",
        stage="evaluate",
        config=config,
        inputs=inputs,
        command=session.command,
        force=session.force,
    ) as publication:
        results, items = _evaluate(config, session)
        _write(publication.folder, results, items)
        publication.metrics.update(results["figures"])
    _report(config, results, session)
    return publication.artifact


def _evaluate(
    config: EvaluateConfig, session: Session
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    import torch

    from mtk.convert.lazy import DTYPES
    from mtk.convert.open_model import open_model
    from mtk.evaluation.documents import read_documents

    documents = {path: read_documents(Path(path), config.text_key) for path in config.valid_data}
    available = "cuda" if torch.cuda.is_available() else "cpu"
    device = available if config.device == "auto" else config.device
    opened = open_model(config.load, dtype=DTYPES[config.dtype], device=device)
    length = _context(config, opened)
    task = _perplexity if config.task == "WIKITEXT103" else _lambada
    figures, items, details = task(config, opened, documents, length, session)
    if not math.isfinite(figures["loss"]):
        raise GateError(
            f"the loss is {figures['loss']}: the model's weights, or what it computes in "
            f"{config.dtype}, are not finite. Nothing was published. Try --dtype fp32."
        )
    results = {
        **FORMAT,
        "task": config.task,
        "figures": figures,
        "model": {
            "kind": opened.kind,
            "digest": opened.artifact.digest if opened.artifact else None,
            "tokenizer": opened.tokenizer.fingerprint,
            "dtype": config.dtype,
        },
        "data": [_data_record(path, len(found)) for path, found in documents.items()],
        "seq_length": length,
        **details,
    }
    return results, items


def _context(config: EvaluateConfig, opened: OpenedModel) -> int:
    """Tokens a window may have. Raises ConfigError beyond the model's positions."""
    limit = opened.config.positions
    trained = opened.config.seq_length if config.task == "WIKITEXT103" else limit
    length = config.seq_length or trained
    problems = []
    if length > limit and opened.config.positions_are_limited:
        rule = f"exceeds the {limit} positions of the model"
        problems.append(Problem("seq_length", length, rule, f"Nearest: {limit}."))
    elif config.overlapping_eval is not None and config.overlapping_eval > length:
        rule = f"exceeds the context of {length}: tokens in between would not be scored"
        found = config.overlapping_eval
        problems.append(Problem("overlapping_eval", found, rule, f"Nearest: {length}."))
    if problems:
        raise ConfigError(problems)
    return length


def _perplexity(
    config: EvaluateConfig,
    opened: OpenedModel,
    documents: dict[str, list[Document]],
    length: int,
    session: Session,
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    from mtk.evaluation import detokenizers
    from mtk.evaluation.perplexity import DEFINITIONS, Settings, perplexity

    rules = {
        detokenizers.choose(path) if config.detokenizer == "auto" else config.detokenizer
        for path in config.valid_data
    }
    if len(rules) > 1:
        raise DataError(
            f"the paths of --valid-data suggest different detokenizers "
            f"({', '.join(sorted(rules))}). Evaluate the files apart, or choose one with "
            f"--detokenizer."
        )
    chosen = rules.pop()
    session.reporter.info(f"detokenizer: {chosen}")
    settings = Settings(length, config.overlapping_eval, config.batch_size, detokenizer=chosen)
    everything = [document for found in documents.values() for document in found]
    with session.reporter.progress("evaluate", None, "tokens") as bar:
        result = perplexity(opened.model, opened.tokenizer, everything, settings, bar.advance)
    details = {
        "detokenizer": chosen,
        "overlapping_eval": config.overlapping_eval,
        "definitions": DEFINITIONS,
    }
    return result.figures, result.items, details


def _lambada(
    config: EvaluateConfig,
    opened: OpenedModel,
    documents: dict[str, list[Document]],
    length: int,
    session: Session,
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    from mtk.evaluation.lambada import DEFINITIONS, lambada

    everything = [document for found in documents.values() for document in found]
    with session.reporter.progress("evaluate", len(everything), "passages") as bar:
        result = lambada(
            opened.model,
            opened.tokenizer,
            everything,
            strict=config.strict_lambada,
            seq_length=length,
            batch_size=config.batch_size,
            advance=bar.advance,
        )
    return result.figures, result.items, {"definitions": DEFINITIONS}


def _data_record(path: str, documents: int) -> dict[str, Any]:
    from mtk.artifacts.hashing import sha256_file

    return {"file": Path(path).name, "sha256": sha256_file(Path(path)), "documents": documents}


def _write(folder: Path, results: dict[str, Any], items: Sequence[dict[str, Any]]) -> None:
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    with (folder / "items.jsonl").open("w", encoding="utf-8") as stream:
        for number, item in enumerate(items):
            stream.write(json.dumps({"item": number, **item}, ensure_ascii=False) + "\n")


def _report(config: EvaluateConfig, results: dict[str, Any], session: Session) -> None:
    figures = results["figures"]
    if config.task == "LAMBADA":
        kind = "last word" if config.strict_lambada else "last token"
        text = (
            f"LAMBADA ({kind}): {figures['correct']} of {figures['total']} right, accuracy "
            f"{figures['accuracy']:.4E}"
        )
    else:
        adjusted = figures["adjusted_perplexity"]
        text = (
            f"loss {figures['loss']:.4E}, perplexity {figures['perplexity']:.4E}, adjusted "
            f"perplexity {'-' if adjusted is None else f'{adjusted:.4E}'}, bits per byte "
            f"{figures['bits_per_byte']:.4f}"
        )
    session.reporter.info(text)
