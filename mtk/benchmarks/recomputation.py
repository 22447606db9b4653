"""``mtk bench recompute``: what each way to recompute keeps, and what it costs in time.

On one device, each variant in a fresh process. Bytes are those of the CUDA allocator beyond
what was allocated before the forward pass, with gradients already there: ``layers`` after the
last layer of the forward pass (activations that wait for backward), ``peak`` at most in
forward and backward (logits and what is being recomputed included). Beside them the planner's
formula for the same two. On the CPU, which counts nothing, only times.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mtk.benchmarks.layouts import reason
from mtk.benchmarks.measured_run import prepare, wait
from mtk.benchmarks.record import gpus, surroundings, write_json
from mtk.config import config_digest, to_dict
from mtk.config.bench import BenchConfig, RecomputeBenchConfig
from mtk.config.plan import PlanConfig
from mtk.errors import Interrupted, MtkError
from mtk.launch.local import launch
from mtk.launch.process import Place
from mtk.log import Reporter
from mtk.parallel.apply import training_device
from mtk.parallel.planning import embedding_activations, logits, stage_activations
from mtk.parallel.ranks import Ranks
from mtk.training.join import training_ranks
from mtk.training.passes import Accumulation
from mtk.training.step import Stepper


@dataclass(frozen=True)
class Measured:
    """Bytes are None on the CPU; seconds: of each measured step."""

    layers: int | None
    peak: int | None
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One variant under one attention kernel. formula_*: the planner's bytes."""

    variant: str
    attention: str
    config_digest: str
    formula_activations: float
    formula_peak: float
    measured: Measured | None = None
    failure: str = ""

    @property
    def step_seconds(self) -> float | None:
        return statistics.median(self.measured.seconds) if self.measured else None


def variants(layers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and the options of ParallelConfig."""
    yield "none", {}
    yield "selective", {"recompute_granularity": "selective"}
    sizes = [("uniform", size) for size in (1, 2, 4) if size <= layers]
    for method, size in [*sizes, ("block", max(1, layers // 2))]:
        yield (
            f"full {method} {size}",
            {
                "recompute_granularity": "full",
                "recompute_method": method,
                "recompute_num_layers": size,
            },
        )


def bench_recompute(config: RecomputeBenchConfig, reporter: Reporter) -> list[Row]:
    """All variants under all kernels; a variant that fails is a row with the reason."""
    device = training_device(config.runtime).type
    hardware = launch(gpus, (1,), device="cuda") if device == "cuda" else []
    rows: list[Row] = []
    for attention in config.attention:
        for name, options in variants(config.model.num_layers):
            parallel = dataclasses.replace(
                config.parallel,
                **{
                    "recompute_granularity": None,
                    "recompute_method": None,
                    "recompute_num_layers": None,
                }
                | options,
            )
            changed = dataclasses.replace(config, parallel=parallel)
            rows.append(_row(name, attention, changed, device))
            reporter.info(" ".join(cells(rows[-1])))
            write_json(config.measure.output, content(config, hardware, rows))
    return rows


def _row(name: str, attention: str, config: RecomputeBenchConfig, device: str) -> Row:
    activations = _formula(config, attention)
    row = Row(
        name,
        attention,
        config_digest(config),
        activations,
        activations + logits(_plan(config, attention)),
    )
    try:
        measured: Measured = launch(measure, (config, attention), device=device)
    except Interrupted:
        raise
    except MtkError as error:
        return dataclasses.replace(row, failure=reason(error))
    return dataclasses.replace(row, measured=measured)


def _formula(config: RecomputeBenchConfig, attention: str) -> float:
    plan = _plan(config, attention)
    return stage_activations(plan, 0) + embedding_activations(plan)


def _plan(config: RecomputeBenchConfig, attention: str) -> PlanConfig:
    """The planner's view: without the math kernel no scores are kept."""
    backend: Literal["auto", "flash"] = "auto" if attention == "math" else "flash"
    runtime = dataclasses.replace(config.runtime, attention_backend=backend)
    return PlanConfig(
        model=config.model,
        batch=config.batch,
        precision=config.precision,
        parallel=config.parallel,
        runtime=runtime,
    )


# -- the measured process -----------------------------------------------------------------


def measure(place: Place, config: RecomputeBenchConfig, attention: str) -> Measured:
    """Bytes of one micro-batch and seconds of whole steps."""
    kernel = _kernel(attention)
    with training_ranks(place, config) as ranks, kernel:
        seconds = tuple(_timed(config, ranks))
        if ranks.device.type != "cuda":
            return Measured(None, None, seconds)
        layers, peak = _bytes(config, ranks)
        return Measured(layers, peak, seconds)


def _kernel(attention: str) -> AbstractContextManager[Any]:
    context: AbstractContextManager[Any] = (
        sdpa_kernel(SDPBackend.MATH) if attention == "math" else nullcontext()
    )
    return context


def _timed(config: BenchConfig, ranks: Ranks) -> Iterator[float]:
    config, stepper, batches = prepare(config, ranks, config.measure.total)
    for step in range(config.measure.total):
        wait(ranks)
        begun = time.perf_counter()
        stepper.step(next(batches), config.batch.full * step)
        wait(ranks)
        if step >= config.measure.warmup:
            yield time.perf_counter() - begun


def _bytes(config: BenchConfig, ranks: Ranks) -> tuple[int, int]:
    """Kept after the layers, and the peak of forward and backward, of one micro-batch."""
    _, stepper, batches = prepare(config, ranks, 2)
    stepper.step(next(batches), 0)
    passes = stepper.passes
    assert isinstance(passes, Accumulation)
    local = passes.local(next(batches).micro_batches[0])
    _with_gradients(stepper)
    kept: list[int] = []
    passes.model.run_layers = _noting(passes.model.run_layers, kept, ranks.device)
    torch.cuda.synchronize(ranks.device)
    before = torch.cuda.memory_allocated(ranks.device)
    torch.cuda.reset_peak_memory_stats(ranks.device)
    passes.terms(local).sum().backward()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(ranks.device)
    return kept[0], torch.cuda.max_memory_allocated(ranks.device) - before


def _with_gradients(stepper: Stepper) -> None:
    """Gradients are there before forward, so that backward makes none."""
    for parameter in stepper.placed.named_parameters().values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _noting(run: Callable[..., Tensor], kept: list[int], device: torch.device) -> Any:
    """``run`` that notes how much more is allocated after it than before."""

    def noted(*inputs: Any) -> Tensor:
        before = torch.cuda.memory_allocated(device)
        out = run(*inputs)
        kept.append(torch.cuda.memory_allocated(device) - before)
        return out

    return noted


# -- output -------------------------------------------------------------------------------

COLUMNS = (
    "recompute",
    "attention",
    "kept by layers, GB",
    "formula, GB",
    "peak, GB",
    "formula with logits, GB",
    "s/step",
)


def cells(row: Row) -> list[str]:
    """The row's texts under ``COLUMNS``."""
    found = row.measured
    return [
        row.variant,
        row.attention,
        row.failure if found is None else _gigabytes(found.layers),
        _gigabytes(row.formula_activations),
        _gigabytes(found.peak if found else None),
        _gigabytes(row.formula_peak),
        f"{row.step_seconds:.4f}" if row.step_seconds else "-",
    ]


def _gigabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e9:.3f}"


def content(
    config: RecomputeBenchConfig, hardware: Sequence[dict[str, Any]], rows: Sequence[Row]
) -> dict[str, Any]:
    """All figures as plain data; bytes and seconds."""
    return {
        "benchmark": "recompute",
        **surroundings(),
        "gpus": list(hardware),
        "config": to_dict(config),
        "config_digest": config_digest(config),
        "rows": [plain(row) for row in rows],
    }


def plain(row: Row) -> dict[str, Any]:
    return dataclasses.asdict(row) | {"step_seconds": row.step_seconds}
