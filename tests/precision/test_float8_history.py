"""Delayed scaling: scales from earlier steps, the first pass, evaluation, resume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.artifacts.hashing import sha256_file
from mtk.benchmarks.measured_run import prepare
from mtk.config import make
from mtk.config.pretrain import PretrainConfig
from mtk.log import Reporter
from mtk.parallel.ranks import Ranks
from mtk.precision.float8_history import FIRST_OF_GRADIENTS
from mtk.session import Session
from mtk.training.batch import GlobalBatch
from mtk.training.metrics import read_metrics
from mtk.training.step import Stepper
from stages.pretrain import run
from tests.precision.test_float8 import config

DELAYED = {"fp8_recipe": "delayed", "fp8_min_size": 16, "micro_batch_size": 2}
QUIET = Session(Reporter(quiet=True))


def begun(**changes: Any) -> tuple[Stepper, Iterator[GlobalBatch]]:
    _, stepper, batches = prepare(config(**(DELAYED | changes)), Ranks(), 30)
    return stepper, batches


def test_scales_are_those_of_the_steps_before() -> None:
    stepper, batches = begun(fp8_amax_history_len=3, fp8_margin=2)
    scales = stepper.scales
    assert scales is not None and scales.fresh
    gradients = scales.layers[0].gradients
    assert scales.layers[0].scale is not None
    first = scales.layers[0].scale.tolist()
    assert first == [FIRST_OF_GRADIENTS if flag else 1.0 for flag in gradients]
    stepper.step(next(batches), 0)
    assert not scales.fresh and bool((scales.amaxes_HR[:2] > 0).all())
    assert not scales.amaxes_HR[2].any()  # the measuring pass and one step
    seen = scales.amaxes_HR.clone()
    expected = scales.limits_R / seen.amax(0)
    torch.testing.assert_close(torch.cat(scales._buffers("scale")), expected)
    assert scales.limits_R[0] == 448.0 / 4  # E4M3 with a margin of two powers of 2
    stepper.step(next(batches), 2)
    assert torch.equal(scales.amaxes_HR[1:], seen[:2])
    assert not torch.cat(scales._buffers("amax")).any()


def test_there_is_room_for_what_grows() -> None:
    """Four times what was seen is still in range, as losses fell behind bf16's without it."""
    delayed, _ = begun()
    none, _ = begun(fp8_margin=0)
    assert delayed.scales is not None and none.scales is not None
    assert torch.equal(4 * delayed.scales.limits_R, none.scales.limits_R)
    assert config(fp8_min_size=16).precision.margin == 1.0  # tensorwise


def test_the_measuring_pass_trains_nothing() -> None:
    """The first step's loss is that of the initial weights, whatever was done before it."""
    delayed, batches = begun()
    plain, same = begun(fp8_recipe="tensorwise")
    one = delayed.step(next(batches), 0).loss.item()
    assert one == pytest.approx(plain.step(next(same), 0).loss.item(), rel=1e-3)


def test_training_follows_own_scales() -> None:
    losses = []
    for recipe in ("tensorwise", "delayed"):
        stepper, batches = begun(fp8_recipe=recipe)
        losses.append([stepper.step(next(batches), 2 * i).loss.item() for i in range(30)])
    assert losses[0][-1] < 0.6 * losses[0][0]
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.1)


def test_a_history_of_other_layers_has_another_name() -> None:
    first, _ = begun(num_layers_at_start_in_bf16=1)
    last, _ = begun(num_layers_at_end_in_bf16=1)
    assert first.scales is not None and last.scales is not None
    assert first.scales.amaxes_HR.shape == last.scales.amaxes_HR.shape
    assert first.scales.key != last.scales.key
    again, _ = begun(num_layers_at_start_in_bf16=1)
    assert again.scales is not None and again.scales.key == first.scales.key


def test_evaluation_leaves_no_trace() -> None:
    stepper, batches = begun()
    stepper.step(next(batches), 0)
    batch = next(batches)
    stepper.passes.evaluate(batch.micro_batches, lambda outputs, local: None)
    assert stepper.scales is not None
    assert not torch.cat(stepper.scales._buffers("amax")).any()


@pytest.mark.slow
def test_a_resumed_run_is_exact(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        **{"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32},
        **{"vocab_size": 97, "mock_data": True, "global_batch_size": 4, "train_iters": 8},
        **{"precision": "bf16", "fp8_format": "hybrid", "device": "cpu", "lr": 1e-2},
        **{"hidden_dropout": 0.1, "attention_dropout": 0.0, "save_interval": 4, "plots": False},
        **{"log_interval": 1, "eval_interval": 3, "eval_iters": 1, "activation": "gelu-tanh"},
        **DELAYED,
    }

    def trained(folder: Path) -> tuple[list[float], str]:
        run(make(PretrainConfig, **values, save=str(folder)), QUIET)
        records = read_metrics(folder / "metrics.jsonl")
        weights = next((folder / "step_00000008").glob("model-*.safetensors"))
        return [r["loss"] for r in records if r["event"] == "train"], sha256_file(weights)

    expected = trained(tmp_path / "straight")
    trained(tmp_path / "resumed")
    (tmp_path / "resumed" / "step_00000008" / "artifact.json").unlink()  # as if killed before
    assert trained(tmp_path / "resumed") == expected
