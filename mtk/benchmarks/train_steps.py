"""mtk's own training as a subject of the stopwatch: real stepper, real loader."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mtk.benchmarks.measured_run import gathered, prepare
from mtk.benchmarks.timing import Clock, Mark, Subject, TrainRun, measure, steps_needed
from mtk.config.bench import TrainBenchConfig
from mtk.launch.process import Place
from mtk.parallel.groups import NoTrace
from mtk.training.batch import GlobalBatch, LocalBatch
from mtk.training.join import training_ranks
from mtk.training.passes import Accumulation
from mtk.training.step import Stepper


def measure_mtk(place: Place, config: TrainBenchConfig) -> list[TrainRun]:
    """The run of each rank, on all ranks; for ``launch``."""
    with training_ranks(place, config) as ranks:
        begun = time.perf_counter()
        config, stepper, batches = prepare(config, ranks, steps_needed(config, ranks.device))
        Clock(ranks.device).wait()
        built = time.perf_counter() - begun
        samples = 0

        def step(batch: GlobalBatch) -> Tensor:
            nonlocal samples
            result = stepper.step(batch, samples)
            samples += batch.samples
            return result.loss

        subject = Subject(
            step,
            lambda mark: marked(stepper, mark),
            batches,
            ranks.device,
            sum(weight.numel() for weight in stepper.main.weights.values()),
            built,
        )
        return gathered(measure(subject, config), ranks)


@contextmanager
def marked(stepper: Stepper, mark: Mark) -> Iterator[None]:
    """Steps of ``stepper`` tell where their parts begin. The stepper has no such hooks; what
    it calls is covered while the block runs.

    Taking gradients to the main weights belongs to the optimizer, as it does not exist
    without one. Pipelines mix forward and backward, which then are one part.
    """
    passes, main, ranks = stepper.passes, stepper.main, stepper.ranks
    whole = isinstance(passes, Accumulation)
    phases = {"forward and backward": "other" if whole else "forward and backward"}
    stepper.ranks = replace(ranks, trace=PhaseMarks(mark, phases))
    if isinstance(passes, Accumulation):
        terms, collect = passes.terms, main.collect_gradients

        def told_terms(local: LocalBatch) -> Tensor:
            mark("forward")
            out = terms(local)
            mark("backward")
            return out

        def told_collect() -> None:
            mark("optimizer")
            collect()

        covers: tuple[tuple[Any, str, Any], ...] = (
            (passes, "terms", told_terms),
            (main, "collect_gradients", told_collect),
        )
    else:
        covers = ()
    for owner, name, cover in covers:
        setattr(owner, name, cover)
    try:
        yield
    finally:
        stepper.ranks = ranks
        for owner, name, _ in covers:
            delattr(owner, name)  # the method of the class is there again


@dataclass(frozen=True)
class PhaseMarks(NoTrace):
    """A trace that makes marks of the phases; names: where a part has another name."""

    mark: Mark
    names: dict[str, str]

    def phase(self, name: str) -> None:
        self.mark(self.names.get(name, name))
