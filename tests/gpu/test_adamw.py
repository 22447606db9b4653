"""The AdamW kernel on CUDA against torch's: steps, whole trainings, checkpoints; and that a step
never waits for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.config import make
from mtk.config.pretrain import PretrainConfig
from mtk.parallel.ranks import Ranks
from mtk.training.assemble import make_stepper
from mtk.verification.observe import random_sample, share
from tests.gpu.test_training import BASE, final_weights, losses
from tests.kernels import adamw_cases
from tests.kernels.adamw_cases import CASES, Case

CUDA = torch.device("cuda")
# One micro-batch, whose gradients stay bf16; and two, whose sums are fp32.
MICRO_BATCHES = [8, 4]


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on torch's AdamW is used."""
    monkeypatch.setattr("mtk.training.optimizer.can_fuse", lambda weights: False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_equal_torchs(case: Case) -> None:
    adamw_cases.check_steps(case, CUDA)


@pytest.mark.parametrize(("first", "then"), [(True, False), (False, True), (True, True)])
def test_state_passes_from_one_to_the_other(first: bool, then: bool) -> None:
    adamw_cases.check_state_passes(CUDA, first, then)


def test_the_same_bits_each_time() -> None:
    adamw_cases.check_repeats(CUDA)


@pytest.mark.parametrize("micro", MICRO_BATCHES)
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_training_equals_torchs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, micro: int
) -> None:
    changes: dict[str, Any] = {"precision": precision, "micro_batch_size": micro}
    if precision == "fp16":
        changes["initial_loss_scale"] = 2.0**14
    fused = losses(tmp_path / "fused", device="cuda", **changes)
    plain(monkeypatch)
    # The last bit of an fp32 weight decides now and then how it is rounded to bf16's 8.
    bound = 1e-3 if precision == "bf16" else 1e-4
    assert fused == pytest.approx(losses(tmp_path / "plain", device="cuda", **changes), rel=bound)


@pytest.mark.parametrize("micro", MICRO_BATCHES)
def test_resume_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro: int) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    changes: dict[str, Any] = {
        "precision": "bf16",
        "micro_batch_size": micro,
        "deterministic_mode": True,
    }
    try:
        straight = losses(tmp_path, **changes)
        expected = final_weights(tmp_path)
        (tmp_path / "step_00000020" / "artifact.json").unlink()
        assert losses(tmp_path, **changes) == straight
        assert final_weights(tmp_path) == expected
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("first", ["fused", "plain"])
def test_a_checkpoint_of_one_continues_with_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    with monkeypatch.context() as patch:
        if first == "plain":
            plain(patch)
        straight = losses(tmp_path, precision="bf16", device="cuda")
    (tmp_path / "step_00000020" / "artifact.json").unlink()
    if first == "fused":
        plain(monkeypatch)
    resumed = losses(tmp_path, precision="bf16", device="cuda")
    assert resumed[:10] == straight[:10]
    assert resumed == pytest.approx(straight, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("micro", MICRO_BATCHES)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_step_does_not_wait_for_the_device(tmp_path: Path, precision: str, micro: int) -> None:
    changes = {"precision": precision, "micro_batch_size": micro, "save": str(tmp_path)}
    config = make(PretrainConfig, **{**BASE, **changes})
    stepper = make_stepper(config, 160, Ranks(device=CUDA))
    assert stepper.optimizer.fused
    batch = share(random_sample(config), micro, 0, 1)
    stepper.step(batch, 0)  # compiles, and makes what is made once
    try:
        torch.cuda.set_sync_debug_mode("error")
        results = [stepper.step(batch, 8 * step) for step in (1, 2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(result.loss) for result in results)
