"""A family's training on two ranks beside one process.

Twice for each layout: a step on random tokens with an uneven loss mask, all of its gradients and
updated weights held against those of one process, as ``mtk verify layout`` does; and some steps
on the text, whose losses must be the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtk.benchmarks.measured_run import prepare
from mtk.config.pretrain import BatchConfig, PretrainConfig
from mtk.errors import GateError, MtkError
from mtk.launch.pool import RankPool
from mtk.parallel.layout_names import parse
from mtk.training.join import ranks_in_turn
from mtk.verification.compare import Difference, Tolerance, compare
from mtk.verification.layout import in_one_process
from mtk.verification.matrix import observe_in_turn
from mtk.verification.prepare import comparable, tolerance_of

RANKS = 2
LAYOUTS = {"tp2": "tp2", "pp2": "pp2.1f1b", "dp2": "dp2.replicate"}
EXPERT_LAYOUTS = {"ep2": "ep2-dp2.replicate"}
# Several micro-batches for each rank and stage. Eight sequences were too few for BERT: the gradient
# of the bias of its binary head, a sum over sequences, cancelled so far that one process with other
# micro-batches differed from itself by more than the tolerance.
MICRO_BATCH, BATCH = 2, 16
STEPS = 20
LR = 1e-3
# Relative difference of the loss of a step, after up to 19 others: no more than after none.
LOSS_TOLERANCE = Tolerance().loss
# Seconds for a job on a busy machine.
LIMIT = 300.0


@dataclass(frozen=True)
class LayoutCell:
    """step: errors of one step; None where the ranks do not even agree. loss_error: greatest
    relative difference of the losses of the training."""

    layout: str
    step: Difference
    losses: list[float]
    loss_error: float

    @property
    def failures(self) -> list[str]:
        found = [f"{self.layout}: {text}" for text in self.step.failures]
        if not self.loss_error <= LOSS_TOLERANCE:
            error = f"{self.loss_error:.1e} > {LOSS_TOLERANCE:.0e}"
            found.append(f"{self.layout}: loss in {len(self.losses)} steps on the text {error}")
        return found

    def fields(self) -> dict[str, Any]:
        """For machines."""
        return {
            "layout": self.layout,
            "loss": self.step.loss,
            "norm": self.step.norm,
            "balance": self.step.balance,
            "worst_gradient": self.step.worst_gradient,
            "worst_weight": self.step.worst_weight,
            "losses_on_text": self.losses,
            "loss_on_text": self.loss_error,
            "failures": self.failures,
        }


def make_pool() -> RankPool:
    """Ranks for all families."""
    return RankPool(RANKS, preload=[__name__], timeout=LIMIT)


def compare_layouts(config: PretrainConfig, pool: RankPool) -> dict[str, LayoutCell]:
    """Cells by short names. Raises GateError when ranks do not agree with each other, and what
    a failing rank raises."""
    names = LAYOUTS | (EXPERT_LAYOUTS if config.model.num_experts else {})
    runs = [_in_layout(config, layout) for layout in names.values()]
    one = [in_one_process(runs[0])]
    reference = pool.run(observe_in_turn, one, 1, world=1, limit=LIMIT)[0][0]
    alone = pool.run(train_in_turn, one, 1, world=1, limit=LIMIT)[0][0]
    steps = pool.run(observe_in_turn, runs, RANKS, world=RANKS, limit=LIMIT)
    trained = pool.run(train_in_turn, runs, RANKS, world=RANKS, limit=LIMIT)
    cells = {}
    for k, (short, layout) in enumerate(names.items()):
        try:
            observed = [rank[k] for rank in steps]
            difference = compare(reference, observed, tolerance_of(runs[k]))
        except ValueError as error:
            raise GateError(f"{short}: {error}.") from error
        losses = trained[0][k]
        cells[short] = LayoutCell(layout, difference, losses, _greatest(losses, alone))
    return cells


def _in_layout(config: PretrainConfig, layout: str) -> PretrainConfig:
    """The run such that layouts compute the same numbers."""
    config = dataclasses.replace(
        config,
        parallel=parse(layout),
        batch=BatchConfig(micro_batch_size=MICRO_BATCH, global_batch_size=BATCH),
        optimizer=dataclasses.replace(config.optimizer, lr=LR, min_lr=0.0),
    )
    config, _ = comparable(config)
    problems = [*config.model.problems(), *config.problems()]
    if problems:
        raise MtkError("; ".join(str(problem) for problem in problems))
    return config


def train_in_turn(rank: int, runs: Sequence[PretrainConfig], world: int) -> list[list[float]]:
    """The losses of each run's first steps, on the ranks of one job."""
    found = []
    for run, ranks in ranks_in_turn(rank, runs, world):
        run, stepper, batches = prepare(run, ranks, STEPS)
        steps = (stepper.step(batch, run.batch.full * k) for k, batch in enumerate(batches))
        found.append([step.loss.sum().item() for step in steps])
    return found


def _greatest(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Relative difference; infinite where the numbers of steps differ."""
    if len(losses) != len(reference):
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))
