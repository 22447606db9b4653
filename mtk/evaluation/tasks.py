"""One evaluation from an opened model to figures and items, for every task there is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtk.artifacts.hashing import sha256_file
from mtk.config.evaluate import EvaluateConfig
from mtk.convert.open_model import OpenedModel
from mtk.errors import ConfigError, GateError, Problem
from mtk.evaluation import detokenizers, lambada, perplexity
from mtk.evaluation.documents import Document, read_documents, read_passages
from mtk.evaluation.scorer import Scorer
from mtk.evaluation.scoring import PAD
from mtk.evaluation.text_ids import TextIds
from mtk.evaluation.windows import context_length
from mtk.log import Reporter
from mtk.parallel.groups import Group

if TYPE_CHECKING:
    from mtk.evaluation.lm_eval_model import Generate


@dataclass(frozen=True)
class Outcome:
    """figures, items: see docs/evaluation.md. details: how they were made. summary: for people."""

    figures: dict[str, Any]
    items: list[dict[str, Any]]
    summary: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """Everything a task needs besides its options. data: path -> documents of mtk's own tasks."""

    config: EvaluateConfig
    opened: OpenedModel
    scorer: Scorer
    text: TextIds
    length: int
    reporter: Reporter
    data: dict[str, list[Document]] = field(default_factory=dict)

    @property
    def documents(self) -> list[Document]:
        return [document for found in self.data.values() for document in found]


def prepare(config: EvaluateConfig, opened: OpenedModel, world: Group, reporter: Reporter) -> Bench:
    """Read the data and check it against the model. Raises ConfigError, DataError."""
    opened.require_decoder("task", config.task)
    scorer = Scorer(
        opened.model,
        PAD,
        batch_tokens=config.batch_tokens,
        batch_size=config.batch_size,
        world=world,
    )
    own = config.valid_data if not config.harness_tasks else ()
    # Whatever its name is: a text file would be one passage of many.
    read = read_passages if config.task == "LAMBADA" else read_documents
    data = {path: read(Path(path), config.text_key) for path in own}
    text = TextIds(opened.tokenizer, config.prepend_bos)
    return Bench(config, opened, scorer, text, _context(config, opened), reporter, data)


def _context(config: EvaluateConfig, opened: OpenedModel) -> int:
    """Tokens a window may have. Raises ConfigError beyond the model's positions."""
    limit = opened.config.positions
    as_trained = config.task == "WIKITEXT103" and config.windows == "megatron"
    usual = min(opened.config.seq_length, limit) if as_trained else limit
    length = context_length(config.seq_length, opened.config, usual)
    if config.overlapping_eval is not None and config.overlapping_eval > length:
        rule = f"exceeds the context of {length}: tokens in between would not be scored"
        found = config.overlapping_eval
        raise ConfigError([Problem("overlapping_eval", found, rule, f"Nearest: {length}.")])
    return length


def perplexity_task(bench: Bench) -> Outcome:
    """WIKITEXT103: perplexity of any text."""
    config = bench.config
    chosen = detokenizers.choose_all(config.valid_data, config.detokenizer)
    bench.reporter.info(f"detokenizer: {chosen}")
    settings = perplexity.Settings(bench.length, config.overlapping_eval, chosen, config.windows)
    with bench.reporter.progress("evaluate", None, "tokens") as bar:
        result = perplexity.perplexity(
            bench.scorer, bench.text, bench.documents, settings, bar.advance
        )
    figures = result.figures
    require_finite([figures["loss"]], config.dtype)
    adjusted = figures["adjusted_perplexity"]
    summary = (
        f"loss {figures['loss']:.4E}, perplexity {figures['perplexity']:.4E}, adjusted "
        f"perplexity {'-' if adjusted is None else f'{adjusted:.4E}'}, bits per byte "
        f"{figures['bits_per_byte']:.4f}"
    )
    details = {
        **_own_details(bench),
        "detokenizer": chosen,
        "windows": config.windows,
        "overlapping_eval": config.overlapping_eval,
        "definitions": perplexity.DEFINITIONS,
    }
    return Outcome(figures, result.items, summary, details)


def lambada_task(bench: Bench) -> Outcome:
    """LAMBADA: the last word of passages."""
    documents, strict = bench.documents, bench.config.strict_lambada
    with bench.reporter.progress("evaluate", len(documents), "passages") as bar:
        result = lambada.lambada(
            bench.scorer,
            bench.text,
            documents,
            strict=strict,
            seq_length=bench.length,
            advance=bar.advance,
        )
    figures = result.figures
    require_finite([figures["loss"]], bench.config.dtype)
    if figures["truncated"]:
        bench.reporter.warn(
            f"{figures['truncated']} passages are longer than the context of {bench.length} "
            f"tokens; their beginning was left out"
        )
    summary = (
        f"LAMBADA ({'last word' if strict else 'last token'}): {figures['correct']} of "
        f"{figures['total']} right, accuracy {figures['accuracy']:.4E}"
    )
    details = {**_own_details(bench), "definitions": lambada.DEFINITIONS}
    return Outcome(figures, result.items, summary, details)


def harness_task(bench: Bench, generate: Generate) -> Outcome:
    """Tasks of lm-evaluation-harness."""
    from mtk.evaluation import lm_eval_tasks as harness
    from mtk.evaluation.lm_eval_results import harness_result

    config, first = bench.config, bench.scorer.world.first
    folder = Path(config.lm_eval_tasks).resolve() if config.lm_eval_tasks else None
    data = Path(config.valid_data[0]).resolve() if config.valid_data else None
    bench.reporter.info(f"lm-evaluation-harness: {', '.join(config.harness_tasks)}")
    with (
        bench.reporter.progress("evaluate", None, "sequences") as bar,
        harness.surroundings(folder, first=first),
    ):
        from mtk.evaluation.lm_eval_model import MtkModel

        model = MtkModel(
            bench.scorer, bench.text, generate, max_length=bench.length, advance=bar.advance
        )
        tasks = harness.load_tasks(config, folder, data)
        if unchanged := harness.without_examples(tasks, config.num_fewshot):
            bench.reporter.warn(
                f"--num-fewshot {config.num_fewshot} is not for {', '.join(unchanged)}, which "
                f"allow no examples, and was left out there"
            )
        found = harness.run_tasks(model, tasks, config.limit, first=first)
        result = harness_result(found, config.limit)
    require_finite(result.log_likelihoods, config.dtype)
    summary = "\n".join(
        f"{name}: {', '.join(f'{metric} {value:.4f}' for metric, value in values.items())}"
        for name, values in result.figures.items()
    )
    records = [_data_record(path, None) for path in config.valid_data]
    details = result.details | {"prepend_bos": bool(bench.text.front), "data": records}
    return Outcome(result.figures, result.items, summary, details)


def _own_details(bench: Bench) -> dict[str, Any]:
    records = [_data_record(path, len(found)) for path, found in bench.data.items()]
    return {"data": records, "prepend_bos": bool(bench.text.front)}


def _data_record(path: str, documents: int | None) -> dict[str, Any]:
    return {"file": Path(path).name, "sha256": sha256_file(Path(path)), "documents": documents}


def require_finite(values: list[float], dtype: str) -> None:
    """Raises GateError unless all losses are numbers."""
    bad = next((value for value in values if not math.isfinite(value)), None)
    if bad is not None:
        raise GateError(
            f"the loss is {bad}: the model's weights, or what it computes in {dtype}, are not "
            f"finite. Nothing was published. Try --dtype fp32."
        )
