"""Learning rate and weight decay against golden values of Megatron's scheduler."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mtk.config import make
from mtk.config.pretrain import PretrainConfig
from mtk.errors import ConfigError
from mtk.training.schedule import Schedule

BASE = Schedule(
    style="linear",
    max_lr=1e-3,
    min_lr=1e-4,
    init_lr=0.0,
    warmup=100,
    decay=1000,
    wsd_style="exponential",
    wsd_decay=300,
    start_wd=0.0,
    end_wd=0.1,
    wd_style="linear",
    wd_increase=1000,
)
SAMPLES = (0, 50, 100, 101, 500, 700, 850, 1000, 1001)


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("linear", (0, 5e-4, 1e-3, 9.99e-4, 6e-4, 4e-4, 2.5e-4, 1e-4, 1e-4)),
        ("cosine", (0, 5e-4, 1e-3, 9.99997e-4, 6.28142e-4, 3.25e-4, 1.60289e-4, 1e-4, 1e-4)),
        (
            "inverse-square-root",
            (0, 5e-4, 1e-3, 9.95037e-4, 4.47214e-4, 3.77964e-4, 3.42997e-4, 3.16228e-4, 1e-4),
        ),
        ("constant", (0, 5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3)),
    ],
)
def test_styles(style: str, expected: tuple[float, ...]) -> None:
    schedule = dataclasses.replace(BASE, style=style)
    assert [schedule.lr(n) for n in SAMPLES] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "at_850"),
    [
        ("linear", 5.5e-4),
        ("cosine", 5.5e-4),
        ("exponential", 4.72792e-4),
        ("minus_sqrt", 3.63604e-4),
    ],
)
def test_wsd(shape: str, at_850: float) -> None:
    schedule = dataclasses.replace(BASE, style="WSD", wsd_style=shape)
    assert schedule.lr(700) == 1e-3
    assert schedule.lr(850) == pytest.approx(at_850, rel=1e-5)
    assert schedule.lr(1000) == pytest.approx(1e-4)


def test_weight_decay_increase() -> None:
    assert BASE.weight_decay(500) == pytest.approx(0.05)
    assert BASE.weight_decay(2000) == 0.1
    cosine = dataclasses.replace(BASE, wd_style="cosine")
    assert cosine.weight_decay(500) == pytest.approx(0.05)
    assert cosine.weight_decay(250) == pytest.approx(0.1 * 0.146447, rel=1e-4)


def pretrain_config(**changes: Any) -> PretrainConfig:
    values: dict[str, Any] = {
        "recipe": None,
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 16,
        "lr": 1e-3,
        "data_path": ["x"],
        "save": "out",
        "train_iters": 100,
        "micro_batch_size": 2,
        "global_batch_size": 8,
    }
    return make(PretrainConfig, **(values | changes))


def test_iterations_become_samples() -> None:
    config = pretrain_config(lr_warmup_iters=10, lr_decay_iters=50)
    schedule = Schedule.from_config(config, 800)
    assert (schedule.warmup, schedule.decay, schedule.wd_increase) == (80, 400, 800)


def test_fraction_is_of_the_decay_length() -> None:
    config = pretrain_config(lr_warmup_fraction=0.1, lr_decay_iters=50)
    assert Schedule.from_config(config, 800).warmup == 40


def test_warmup_must_end_before_decay() -> None:
    with pytest.raises(ConfigError, match="shorter"):
        Schedule.from_config(pretrain_config(lr_warmup_iters=100), 800)
