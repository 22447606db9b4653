"""``mtk data trace``: which documents a step of a training saw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mtk.log import Reporter
    from mtk.training.audit import SavedRun, Trace, TracedRun


def register(app: typer.Typer, parents: Mapping[str, typer.Typer]) -> None:
    """Add the command to the group ``data``."""
    del app
    help = "The documents, with file and line, behind every sample of a training step."
    parents["data"].command("trace", help=help)(_trace)


def _trace(
    step: Annotated[int, typer.Option(help="Number of the step, as metrics.jsonl counts it.")],
    load: Annotated[
        str | None, typer.Option(help="A checkpoint of the training, or the folder of them.")
    ] = None,
    config: Annotated[
        list[str] | None, typer.Option(help="YAML file or artifact.json with its options.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="One option as group.name=value.")
    ] = None,
    stage: Annotated[
        str, typer.Option(help="Whose options --config holds: pretrain or finetune.")
    ] = "pretrain",
    data_parallel_size: Annotated[
        int | None, typer.Option(help="Ranks that shared a step (default: as recorded).")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Hash corpora before their lines are believed."),
    ] = True,
    json_: Annotated[
        bool, typer.Option("--json", help="One JSON line a sample on stdout, then the result.")
    ] = False,
) -> None:
    from mtk.errors import ConfigError, Problem
    from mtk.log import Reporter
    from mtk.training.audit import check_same_data, trace_step

    if (load is None) == (not config):
        rule = "give exactly one of --load CHECKPOINT and --config FILE"
        raise ConfigError([Problem("load", load, rule)])
    if stage not in ("pretrain", "finetune"):
        rule = "must be pretrain or finetune"
        raise ConfigError([Problem("stage", stage, rule, "Nearest: pretrain.")])
    if data_parallel_size is not None and data_parallel_size < 1:
        rule = "must be at least 1"
        raise ConfigError([Problem("data_parallel_size", data_parallel_size, rule, "Nearest: 1.")])
    reporter = Reporter(json_lines=json_)
    saved = None if load is None else _saved(load)
    run = _opened(saved, stage, config or [], set_ or [], data_parallel_size, reporter)
    if saved is not None:
        check_same_data(run, saved, step)
    trace = trace_step(run, step, verify_corpus=verify)
    for sample in trace.samples:
        reporter.event("sample", **sample.to_dict())
    reporter.result(
        "\n".join(_lines(step, run, trace)),
        step=step,
        samples=len(trace.samples),
        data_parallel_size=run.ranks,
        unknown=dict(trace.unknown),
    )


def _saved(path: str) -> SavedRun:
    from mtk.checkpoint import checkpoint_folder
    from mtk.training.audit import saved_run

    return saved_run(checkpoint_folder(path))


def _opened(
    saved: SavedRun | None,
    name: str,
    files: list[str],
    assignments: list[str],
    ranks: int | None,
    reporter: Reporter,
) -> TracedRun:
    from mtk.config.files import read_layer, set_layer
    from mtk.config.resolve import Layer
    from mtk.training.audit import finetuning, pretraining
    from stages.registry import stage

    layers = [read_layer(file) for file in files]
    if saved is not None:
        name, ranks = saved.stage, ranks or saved.ranks
        layers = [Layer("the checkpoint", dict(saved.config))]
    if assignments:
        layers.append(set_layer(assignments))
    config: Any = stage(name).resolve(layers).config
    return (finetuning if name == "finetune" else pretraining)(config, reporter, ranks)


def _lines(step: int, run: TracedRun, trace: Trace) -> list[str]:
    numbers = [sample.sample for sample in trace.samples]
    lines = [
        f"step {step}: samples {min(numbers):,} to {max(numbers):,} of {run.total:,}, "
        f"{run.ranks} data-parallel ranks"
    ]
    place: tuple[int, int] | None = None
    for sample in trace.samples:
        if (sample.rank, sample.micro_batch) != place:
            place = (sample.rank, sample.micro_batch)
            lines.append(f"rank {sample.rank}, micro-batch {sample.micro_batch}")
        lines.append(f"  sample {sample.sample:,} of {sample.dataset}")
        lines += [f"    {part}" for part in sample.parts]
    lines += [f"origins not known in {name}: {why}" for name, why in trace.unknown.items()]
    return lines
