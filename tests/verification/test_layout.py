"""``mtk verify layout``: figures, verdicts, exit codes; a seeded fault is found and named."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from mtk.config import make
from mtk.config.pretrain import PretrainConfig
from mtk.verification.compare import Tolerance, compare
from mtk.verification.exchange import read_observation, write_observation
from mtk.verification.observe import Observation
from mtk.verification.prepare import comparable, tolerance_of
from tests.verification import faults
from tests.verification.runs import DENSE, MOE, verify

SP = ["--tp", "2", "--sequence-parallel"]


def test_figures_of_a_dense_layout(capsys: pytest.CaptureFixture[str]) -> None:
    code, found, text = verify(capsys, "layout", *DENSE, *SP, "--steps", "2")
    assert code == 0 and found["equal"] and found["failures"] == []
    assert (found["layout"], found["ranks"], found["device"]) == ("tp2.sp", 2, "cpu")
    assert found["one_process"]["loss"] == pytest.approx(math.log(61), rel=0.1)
    assert found["in_layout"]["norm"] == pytest.approx(found["one_process"]["norm"], rel=2e-6)
    errors = found["errors"]
    assert 0 < max(errors["gradients"].values()) < 2e-5
    assert "layers.1.mlp.up.weight" in errors["gradients"]
    # Twice the steps, twice the tolerance.
    assert found["tolerance"]["loss"] == 2e-6
    assert "dropout: off" in text and "adam-eps" in text


def test_a_missing_reduction_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtk.verification.layout.prove_on_rank", faults.without_partial_sums)
    code, found, text = verify(capsys, "layout", *DENSE, *SP)
    assert code == 5 and not found["equal"]
    assert any("gradient of final_norm.weight" in failure for failure in found["failures"])
    assert "does not equal one process" in text


@pytest.mark.slow
def test_experts_shrunk_with_packed_documents(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["--ep", "2", "--pp", "2", "--data-parallel-sharding", "full"]
    code, found, text = verify(
        capsys, "layout", *MOE, *layout, "--shrink", "--reset-attention-mask"
    )
    assert code == 0 and found["ranks"] == 4
    assert found["one_process"]["balance"]["moe_aux_loss"] > 0.5
    assert found["errors"]["balance"] < 1e-6
    assert "shrunk: 2 layers" in text


@pytest.mark.slow
def test_low_precision_has_its_own_tolerance(capsys: pytest.CaptureFixture[str]) -> None:
    code, found, text = verify(capsys, "layout", *DENSE, *SP, "--bf16", "--shrink")
    assert code == 0
    assert found["tolerance"]["gradient"] == 0.125
    assert "tolerances: those of bf16" in text


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--nproc", "1"], "is the one process"),
        (["--tp", "3"], "Nearest: 2 or 4"),
        (["--tp", "2", "--steps", "0"], "check.steps"),
        (["--tp", "2", "--limit", "4"], "only means something with --matrix"),
        (["--tp", "2", "--nproc", "3"], "must be a multiple of TP x PP x CP"),
    ],
)
def test_bad_options(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, text = verify(capsys, "layout", *DENSE, *words)
    assert code == 2 and named in text


def test_ranks_that_others_started_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, text = verify(capsys, "layout", *DENSE, "--tp", "2")
    assert code == 2 and "outside torchrun" in text


# -- its parts ------------------------------------------------------------------------------


def observation(scale: float = 1.0, balance: tuple[float, ...] = (1.0, 2.0)) -> Observation:
    block = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    other = np.full((2,), 1e-9, dtype=np.float32)
    gradients = [("a", (0, 0), block * np.float32(scale)), ("bias", (0,), other)]
    return Observation(3.0, 2.0, gradients, [("a", (0, 0), block), ("bias", (0,), other)], balance)


def test_balancing_losses_are_compared() -> None:
    one = observation()
    assert compare(one, [one]).failures == []
    found = compare(one, [observation(balance=(1.0, 2.00001))])
    assert found.balance == pytest.approx(5e-6)
    assert found.failures == ["balance: relative error 5.00e-06 > 1e-06"]
    with pytest.raises(ValueError, match="balance"):
        compare(one, [one, observation(balance=(1.0, 2.5))])


def test_gradients_that_cancel_are_measured_by_what_cancels() -> None:
    found = compare(observation(), [observation(1 + 1e-4)])
    assert [text.split(":")[0] for text in found.failures] == ["gradient of a"]
    assert found.vanishing == ("bias",) and "bias" not in found.weights


def test_what_is_no_number_is_no_success() -> None:
    bad = dataclasses.replace(observation(math.nan), loss=math.nan)
    assert len(compare(observation(), [bad, bad][:1]).failures) == 2


def test_observations_travel_as_files(tmp_path: Path) -> None:
    one = observation()
    write_observation(dataclasses.replace(one, drifted=("a (rank 1)",)), tmp_path / "drifted")
    drifted = compare(one, [read_observation(tmp_path / "drifted")])
    assert drifted.failures == ["copies that must be equal differ: a (rank 1)"]
    write_observation(one, tmp_path / "one")
    back = read_observation(tmp_path / "one")
    assert (back.loss, back.norm, back.balance) == (one.loss, one.norm, one.balance)
    assert compare(one, [back], Tolerance(0, 0, 0, 0, 0)).failures == []


FLOAT8 = {"precision": "bf16", "fp8_format": "hybrid", "fp8_recipe": "delayed", "seq_length": 16}


def test_tolerances_follow_precision_steps_and_learning_rate() -> None:
    values = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8}
    values |= {"vocab_size": 9, "mock_data": True, "train_iters": 1, "save": "x"}
    config = make(PretrainConfig, **values, lr=1e-2)
    assert tolerance_of(config).weight == pytest.approx(1e-4)
    assert tolerance_of(make(PretrainConfig, **values, lr=1e-5), 3).weight == pytest.approx(3e-5)
    low = make(PretrainConfig, **values, lr=1e-2, precision="fp16")
    assert tolerance_of(low).gradient == pytest.approx(2**-6)
    changed, notes = comparable(low)
    assert changed.precision.initial_loss_scale == 1024
    assert [note.split(":")[0] for note in notes] == [
        "dropout",
        "adam-eps",
        "loss scale",
        "tolerances",
    ]
    changed, notes = comparable(make(PretrainConfig, **(values | FLOAT8), lr=1e-2))
    assert not changed.precision.fp8 and any(note.startswith("FP8: off") for note in notes)
    assert not list(changed.problems())
