"""Stage ``evaluate``: score a model on given files, on one process or several ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtk.artifacts import Artifact, input_file, publish_directory
from mtk.config.evaluate import EvaluateConfig
from mtk.config.heads import TASKS as HEADS
from mtk.data.stop import terminate_cleanly
from mtk.errors import GateError, LayoutError, Problem, ServingError
from mtk.session import Session
from stages.skip import up_to_date

if TYPE_CHECKING:
    from mtk.artifacts import InputRecord
    from mtk.convert.open_model import OpenedModel
    from mtk.convert.source import Source
    from mtk.evaluation.lm_eval_model import Generate
    from mtk.evaluation.tasks import Outcome
    from mtk.launch.process import Place
    from mtk.parallel.groups import Group

FORMAT = {"format": "mtk-evaluation", "version": 2}


@terminate_cleanly()
def run(config: EvaluateConfig, session: Session | None = None) -> Artifact:
    """Write ``results.json`` (figures with their definitions) and ``items.jsonl``.

    Starts ``--nproc`` local ranks, unless torchrun or Slurm has started this process as one
    of its ranks; each holds the whole model and scores its share. Raises DataError for files
    that cannot be scored, GateError for a loss that is not finite.
    """
    from mtk.launch.local import launch
    from mtk.launch.process import find_place

    session = session or Session()
    if config.harness_tasks:
        from mtk.evaluation.lm_eval_tasks import require_harness

        require_harness()
    if config.task == "WIKITEXT103":
        from mtk.evaluation.detokenizers import choose_all

        # Before anything is compared with an earlier run: paths are no part of a digest.
        config = replace(config, detokenizer=choose_all(config.valid_data, config.detokenizer))
    device = _device(config)
    place = find_place(device)
    if place.started_by != "alone" or config.nproc == 1:
        return evaluate_here(place, config, session)
    _, inputs = _inputs(config)
    artifact = up_to_date(config.output, "evaluate", config, inputs, session)
    if artifact is None:
        artifact = launch(
            evaluate_here,
            (config, session.of_rank(0)),
            config.nproc,
            device=device,
            timeout=config.distributed_timeout_minutes * 60,
        )
    return artifact


def _device(config: EvaluateConfig) -> str:
    import torch

    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        rule = "torch sees no CUDA device on this machine"
        raise LayoutError([Problem("device", "cuda", rule, "Use --device cpu.")])
    return "cuda" if available and config.device != "cpu" else "cpu"


@terminate_cleanly()
def evaluate_here(place: Place, config: EvaluateConfig, session: Session) -> Artifact:
    """The part of the rank that this process is; every rank returns the artifact."""
    import torch.distributed as dist

    from mtk.launch.process import join
    from mtk.parallel.collectives import share_object
    from mtk.parallel.groups import Group

    with join(place, config.distributed_timeout_minutes * 60) as trace:
        world = Group("world")
        if place.world > 1:
            ranks = tuple(range(place.world))
            world = Group("world", ranks, place.rank, dist.group.WORLD, trace)
            trace.know({"world": ranks})
        if not world.first:
            session = session.of_rank(place.rank)
        done: Artifact | None = None
        source, inputs = _inputs(config)
        if world.first:
            done = up_to_date(config.output, "evaluate", config, inputs, session)
        done = share_object(done, world, "evaluate.start")
        if done is not None:
            return done
        if not world.first:
            _outcome(config, source, place, world, session)
            return share_object(None, world, "evaluate.published")  # type: ignore[no-any-return]
        artifact = _publish(config, source, inputs, place, world, session)
        share_object(artifact, world, "evaluate.published")
        return artifact


def _inputs(config: EvaluateConfig) -> tuple[Source, list[InputRecord]]:
    from mtk.convert.source import find_source
    from mtk.evaluation.lm_eval_inputs import harness_inputs
    from mtk.evaluation.task_files import data_files

    source = find_source(config.load)
    # By name: a file's name decides how it is read, and files of one artifact share its digest.
    data = [input_file(path, f"data {path.name}".rstrip()) for path in data_files(config)]
    return source, [*source.inputs(), *data, *harness_inputs(config)]


def _publish(
    config: EvaluateConfig,
    source: Source,
    inputs: Sequence[InputRecord],
    place: Place,
    world: Group,
    session: Session,
) -> Artifact:
    with publish_directory(
        config.output,
        kind="evaluation",
        stage="evaluate",
        config=config,
        inputs=inputs,
        command=session.command,
        force=session.force,
    ) as publication:
        outcome, results = _outcome(config, source, place, world, session)
        _write(publication.folder, results, outcome.items)
        publication.metrics.update(_flat(outcome.figures))
    session.reporter.info(outcome.summary)
    return publication.artifact


def _outcome(
    config: EvaluateConfig, source: Source, place: Place, world: Group, session: Session
) -> tuple[Outcome, dict[str, Any]]:
    from mtk.convert.lazy import DTYPES
    from mtk.convert.open_model import open_source
    from mtk.evaluation import tasks

    opened = open_source(source, dtype=DTYPES[config.dtype], device=place.device)
    if config.task in HEADS:
        from mtk.evaluation.head_task import head_task

        outcome, length = head_task(config, opened, world, session.reporter)
    else:
        bench = tasks.prepare(config, opened, world, session.reporter)
        length = bench.length
        if config.harness_tasks:
            outcome = tasks.harness_task(bench, generator(opened, config.batch_size))
        elif config.task == "LAMBADA":
            outcome = tasks.lambada_task(bench)
        else:
            outcome = tasks.perplexity_task(bench)
    results = {
        **FORMAT,
        "task": config.task,
        "figures": outcome.figures,
        "model": {
            "kind": opened.kind,
            "digest": opened.artifact.digest if opened.artifact else None,
            "tokenizer": opened.tokenizer.fingerprint,
            "dtype": config.dtype,
        },
        "seq_length": length,
        **outcome.details,
    }
    return outcome, results


def generator(opened: OpenedModel, rows: int | None = None) -> Generate:
    """Continues prompts by the serving engine's own decoding, ``rows`` at a time (default: 8).

    What it returns raises GateError if the model computes NaN.
    """
    from mtk.evaluation.lm_eval_model import Continuation
    from serving.generation import generate
    from serving.requests import GenerationRequest, StopRules
    from serving.sampling import SamplingParams

    tokenizer = opened.tokenizer
    ends = frozenset(token for token in (tokenizer.eod, tokenizer.eos) if token is not None)

    def continued(prompts: Sequence[Sequence[int]], settings: Continuation) -> list[str]:
        sampling = SamplingParams(
            temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, seed=1234
        )
        request = GenerationRequest(
            prompts=tuple(tuple(prompt) for prompt in prompts),
            max_tokens=settings.max_tokens,
            sampling=sampling,
            stop=StopRules(token_ids=ends, strings=tuple(s for s in settings.until if s)),
        )
        try:
            found = generate(opened.model, tokenizer, request, max_rows=rows or 8)
        except ServingError as error:
            raise GateError(f"{error}. Nothing was published. Try --dtype fp32.") from error
        return [output.text for output in found]

    return continued


def register_with_harness() -> None:
    """Make ``model="mtk"`` known to lm-evaluation-harness in this process. Raises ConfigError
    if it is not installed."""
    from mtk.evaluation.lm_eval_tasks import require_harness

    require_harness()
    from mtk.evaluation.lm_eval_model import register

    register(generator)


def _flat(figures: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``, for the manifest."""

    def walk(part: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in part.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    return dict(walk(figures, prefix))


def _write(folder: Path, results: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> None:
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    with (folder / "items.jsonl").open("w", encoding="utf-8") as stream:
        for number, item in enumerate(items):
            stream.write(json.dumps({"item": number, **item}, ensure_ascii=False) + "\n")
