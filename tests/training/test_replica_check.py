"""``--replica-check-interval`` in a running training: one flipped bit on one of two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtk.checkpoint import complete_steps
from mtk.cli.main import main
from tests.verification import faults
from tests.verification.runs import DENSE

STEPS = ["--train-iters", "4", "--save-interval", "1", "--log-interval", "1", "--no-plots"]
RUN = [*DENSE, *STEPS, "--mock-data", "--tp", "2", "--nproc", "2", "--eval-iters", "0"]


def test_a_flipped_bit_ends_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.pretrain.train_here", faults.with_a_flipped_bit)
    words = ["pretrain", *RUN, "--save", str(tmp_path), "--replica-check-interval", "1"]
    assert main(words) == 5
    text = capfd.readouterr().err
    assert "step 2: copies that must be equal differ" in text
    assert "exp_avg.final_norm.weight (no majority among ranks 0, 1 of tp)" in text
    assert "The newest is step 1." in text
    assert complete_steps(tmp_path) == [1]


@pytest.mark.slow
def test_without_a_fault_and_without_a_check_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = ["--save", str(tmp_path / "checked"), "--replica-check-interval", "2"]
    assert main(["pretrain", *RUN, *checked]) == 0
    monkeypatch.setattr("stages.pretrain.train_here", faults.with_a_flipped_bit)
    assert main(["pretrain", *RUN, "--save", str(tmp_path / "blind")]) == 0
