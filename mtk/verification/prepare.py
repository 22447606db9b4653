"""What a check changes in a configuration, each change in words, and what it tolerates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TypeVar

from mtk.config.float8 import Float8Options
from mtk.config.optimization import ScheduleConfig
from mtk.config.pretrain import PretrainConfig
from mtk.errors import ConfigError, Problem
from mtk.models.count_families import ASSUMED_VOCAB_SIZE
from mtk.verification.compare import Tolerance
from mtk.verification.shrink import shrink

# Adam divides by each gradient's own size: with less, the rounding of vanishing ones is
# blown up to whole steps and the weights say nothing.
ADAM_EPS = 1e-4
# Far below what overflows with random weights.
LOSS_SCALE = 2.0**10
# Relative distance of neighbouring numbers.
SPACING = {"bf16": 2.0**-7, "fp16": 2.0**-10}
Config = TypeVar("Config", bound=PretrainConfig)


def small(config: Config) -> tuple[Config, list[str]]:
    """``config`` shrunk, and what to say of it. Raises ConfigError where it cannot be."""
    config = shrink(config)
    problems = list(_problems(config))
    if problems:
        raise ConfigError(problems)
    model = config.model
    sizes = (
        f"shrunk: {model.num_layers} layers, hidden {model.hidden_size}, {model.seq_length} tokens,"
        f" vocabulary {model.vocab_size}, batch {config.batch.full}; heads, groups, experts and "
        f"the layout as given"
    )
    return config, [sizes]


def _problems(config: PretrainConfig) -> Iterator[Problem]:
    yield from config.model.problems()
    yield from config.problems()


def comparable(config: Config) -> tuple[Config, list[str]]:
    """``config`` such that two layouts compute the same numbers, and what was changed."""
    model, optimizer, precision = config.model, config.optimizer, config.precision
    notes = []
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=ASSUMED_VOCAB_SIZE[model.family])
        notes.append(f"vocabulary: {model.vocab_size} assumed (--vocab-size)")
    if model.hidden_dropout or model.attention_dropout:
        model = dataclasses.replace(model, hidden_dropout=0.0, attention_dropout=0.0)
        notes.append("dropout: off, as its random numbers depend on the layout")
    if optimizer.adam_eps < ADAM_EPS:
        optimizer = dataclasses.replace(optimizer, adam_eps=ADAM_EPS)
        notes.append(
            f"adam-eps: {ADAM_EPS:g}, as Adam makes steps of full size from the rounding of "
            f"vanishing gradients"
        )
    if precision.precision == "fp16" and precision.loss_scale is None:
        precision = dataclasses.replace(precision, initial_loss_scale=LOSS_SCALE, min_loss_scale=1)
        notes.append(f"loss scale: starts at {LOSS_SCALE:g}, so that no step is skipped")
    if precision.fp8:
        precision = dataclasses.replace(precision, **vars(Float8Options()))
        notes.append(
            "FP8: off, as scales are those of a rank's part, and numbers of two or three bits hide "
            "what a layout does"
        )
    if precision.precision in SPACING:
        notes.append(f"tolerances: those of {precision.precision}; --precision fp32 tells far more")
    optimizer = dataclasses.replace(
        optimizer,
        weight_decay_incr_style="constant",
        start_weight_decay=None,
        end_weight_decay=None,
    )
    config = dataclasses.replace(
        config,
        model=model,
        optimizer=optimizer,
        precision=precision,
        schedule=ScheduleConfig(lr_decay_style="constant"),
        batch=dataclasses.replace(config.batch, rampup_batch_size=None),
    )
    return config, notes


def tolerance_of(config: PretrainConfig, steps: int = 1) -> Tolerance:
    """fp32: as the parity matrix; bf16, fp16: in units of the format's spacing. Errors add up
    over steps. Weights: as for a learning rate of 1e-3, beyond that in proportion; in low
    precision two learning rates, the most by which single steps can differ."""
    spacing = SPACING.get(config.precision.precision)
    lr = config.optimizer.lr
    if spacing is None:
        base = Tolerance()
        weight = base.weight * max(1.0, lr / 1e-3)
        values = (base.loss, base.norm, base.gradient, weight, base.balance)
    else:
        values = (spacing, 4 * spacing, 16 * spacing, 2.1 * lr, 4 * spacing)
    return Tolerance(*(value * steps for value in values))
