"""Rules of pipeline parallelism: which schedule, how many stages, what fits together.

Any number of micro-batches from 1 on runs in every schedule, so there is no rule for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mtk.config.model import ModelConfig, nearest_divisor
from mtk.errors import Problem

if TYPE_CHECKING:
    from mtk.config.parallel import ParallelConfig

# Backward in two parts: gradients of inputs first, of weights when there is time.
SPLIT_BACKWARD = ("zero-bubble", "zbv")


def schedule_name(parallel: ParallelConfig) -> str:
    """The schedule asked for; by default 1f1b, or interleaved with virtual stages."""
    if parallel.pipeline_schedule is not None:
        return parallel.pipeline_schedule
    ranks, split = parallel.pipeline_model_parallel_size, parallel.pipeline_split
    longer = split is not None and len(split) > ranks
    virtual = longer or parallel.num_layers_per_virtual_pipeline_stage is not None
    return "interleaved" if virtual and ranks > 1 else "1f1b"


def virtual_stages(parallel: ParallelConfig, layers: int) -> int:
    """Stages per rank."""
    ranks, split = parallel.pipeline_model_parallel_size, parallel.pipeline_split
    chunk = parallel.num_layers_per_virtual_pipeline_stage
    if split is not None:
        return len(split) // ranks
    if chunk is not None:
        return layers // (ranks * chunk)
    return 2 if schedule_name(parallel) in ("interleaved", "zbv") else 1


def problems(
    parallel: ParallelConfig, model: ModelConfig, *, compiled: bool = False
) -> Iterator[Problem]:
    """What a layout asks of its pipeline that cannot be. compiled: blocks go through
    ``torch.compile``."""
    ranks, schedule = parallel.pipeline_model_parallel_size, parallel.pipeline_schedule
    if ranks == 1:
        yield from _without_stages(parallel)
        return
    if ranks > model.num_layers:
        rule = f"is more than model.num_layers = {model.num_layers}"
        fix = f"Nearest: {model.num_layers}."
        yield Problem("parallel.pipeline_model_parallel_size", ranks, rule, fix)
        return
    if parallel.pipeline_split is not None:
        yield from _split(parallel, parallel.pipeline_split, model.num_layers)
    elif parallel.num_layers_per_virtual_pipeline_stage is not None:
        yield from _chunk(parallel, parallel.num_layers_per_virtual_pipeline_stage, model)
    elif virtual_stages(parallel, model.num_layers) * ranks > model.num_layers:
        rule = f"has 2 stages a rank, and {2 * ranks} stages need as many layers"
        fix = f"Nearest: zero-bubble or 1f1b, or --num-layers {2 * ranks}."
        yield Problem("parallel.pipeline_schedule", schedule, rule, fix)
    if compiled and schedule in SPLIT_BACKWARD:
        rule = "delays weight gradients, which a compiled block computes with all others"
        fix = "Nearest: interleaved, or leave out --compile."
        yield Problem("parallel.pipeline_schedule", schedule, rule, fix)


def _without_stages(parallel: ParallelConfig) -> Iterator[Problem]:
    for name in ("pipeline_schedule", "pipeline_split", "num_layers_per_virtual_pipeline_stage"):
        if getattr(parallel, name) is not None:
            rule = "only means something with more than one pipeline stage"
            yield Problem(f"parallel.{name}", getattr(parallel, name), rule, "Raise --pp.")


def _split(parallel: ParallelConfig, split: tuple[int, ...], layers: int) -> Iterator[Problem]:
    ranks, key = parallel.pipeline_model_parallel_size, "parallel.pipeline_split"
    if parallel.num_layers_per_virtual_pipeline_stage is not None:
        fix = "Leave out --num-layers-per-virtual-pipeline-stage."
        yield Problem(key, split, "says how many layers each stage has already", fix)
    if any(count < 1 for count in split):
        yield Problem(key, split, "every stage needs at least one layer")
    if sum(split) != layers:
        rule = f"adds up to {sum(split)}, not to model.num_layers = {layers}"
        yield Problem(key, split, rule)
    yield from _stage_count(parallel, key, split, len(split), f"{ranks} or {2 * ranks} numbers")


def _chunk(parallel: ParallelConfig, chunk: int, model: ModelConfig) -> Iterator[Problem]:
    ranks, key = parallel.pipeline_model_parallel_size, "num_layers_per_virtual_pipeline_stage"
    per_rank, rest = divmod(model.num_layers, ranks)
    if rest:
        rule = f"needs model.num_layers = {model.num_layers} to divide by {ranks} ranks"
        fix = "Say the layers of each stage with --pipeline-split, or leave it out."
        yield Problem(f"parallel.{key}", chunk, rule, fix)
    elif chunk < 1 or per_rank % chunk:
        rule = f"must divide the layers per rank, {per_rank}"
        fix = f"Nearest: {nearest_divisor(max(1, chunk), per_rank)}."
        yield Problem(f"parallel.{key}", chunk, rule, fix)
    else:
        count = model.num_layers // chunk
        fits = f"{per_rank // 2} layers" if per_rank % 2 == 0 else "an even number of layers"
        yield from _stage_count(parallel, f"parallel.{key}", chunk, count, fits)


def _stage_count(
    parallel: ParallelConfig, key: str, found: object, count: int, fits: str
) -> Iterator[Problem]:
    """How many stages a schedule can have on each rank."""
    ranks, schedule = parallel.pipeline_model_parallel_size, schedule_name(parallel)
    if count < ranks or count % ranks:
        yield Problem(key, found, f"makes {count} stages for {ranks} ranks", f"Give {fits}.")
    elif schedule == "1f1b" and count != ranks:
        rule = f"makes {count // ranks} stages a rank; 1f1b runs one"
        yield Problem(key, found, rule, "Nearest: --pipeline-schedule interleaved.")
    elif schedule == "zbv" and count != 2 * ranks:
        rule = f"makes {count // ranks} stages a rank; zbv runs exactly 2"
        yield Problem(key, found, rule, f"Give {fits}, or --pipeline-schedule zero-bubble.")
    elif schedule == "interleaved" and count == ranks:
        rule = "makes one stage a rank, with nothing to interleave"
        yield Problem(key, found, rule, "Nearest: --pipeline-schedule 1f1b.")
