"""The AdamW kernel on the CPU, where Triton is installed and asked to interpret its programs:
``TRITON_INTERPRET=1``. On CUDA the same is checked in ``tests/gpu``."""

from __future__ import annotations

import os

import pytest
import torch

from mtk.kernels import has_triton
from tests.kernels import adamw_cases
from tests.kernels.adamw_cases import CASES, Case
from tests.models.sizes import llama_config, small_model
from tests.training import test_step

pytestmark = pytest.mark.skipif(
    not has_triton() or os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton is not installed, or is not to interpret (TRITON_INTERPRET=1)",
)
CPU = torch.device("cpu")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_equal_torchs(case: Case) -> None:
    adamw_cases.check_steps(case, CPU)


@pytest.mark.parametrize(("first", "then"), [(True, False), (False, True), (True, True)])
def test_state_passes_from_one_to_the_other(first: bool, then: bool) -> None:
    adamw_cases.check_state_passes(CPU, first, then)


def test_the_same_bits_each_time() -> None:
    adamw_cases.check_repeats(CPU)


@pytest.mark.parametrize(("precision", "micro_batches"), [("bf16", 1), ("bf16", 2), ("fp32", 2)])
def test_training_equals_torchs(
    precision: str, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for fused in (True, False):
        monkeypatch.setattr("mtk.training.optimizer.can_fuse", lambda _, fused=fused: fused)
        runner = test_step.stepper(small_model(llama_config()), precision)
        assert runner.optimizer.fused is fused
        batches = [test_step.batch(seed, micro_batches) for seed in range(4)]
        found[fused] = [runner.step(batch, 0).loss.item() for batch in batches]
    assert found[True] == pytest.approx(found[False], rel=1e-4)
