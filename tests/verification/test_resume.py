"""``mtk verify resume``: bit for bit, and what is not is named."""

from __future__ import annotations

from typing import Any

import pytest

from mtk.config import make
from mtk.config.verify import VerifyResumeConfig
from mtk.verification.resume import _prepared
from tests.verification.runs import DENSE, verify


@pytest.mark.slow
def test_two_ranks_continue_bit_for_bit(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["resume", *DENSE, "--tp", "2", "--steps", "3", "--stop-at", "2"]
    code, found, text = verify(capsys, *words)
    assert code == 0 and found["equal"]
    assert (found["steps"], found["stop_at"], found["ranks"]) == (3, 2, 2)
    assert found["compared"]["optimizer"] == 3 * found["compared"]["model"]
    assert found["compared"]["random"] >= 2
    assert "continuing from step 2" in text


def test_generated_data_keeps_the_options_of_windows() -> None:
    model = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8}
    config = make(VerifyResumeConfig, **model, vocab_size=9, lr=1e-3, eod_mask_loss=True)
    assert _prepared(config, "cpu")[0].data.eod_mask_loss


def test_forgotten_random_states_are_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets(*_: Any) -> None:
        return

    monkeypatch.setattr("mtk.training.state.restore_random", forgets)
    code, found, text = verify(capsys, "resume", *DENSE, "--steps", "2")
    assert code == 5 and found["ranks"] == 1
    assert any(name.startswith("continued: model: layers.0") for name in found["differing"])
    assert not any(name.startswith("stopped") for name in found["differing"])
    assert "continuing changes the result" in text


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--steps", "1"], "must be at least 2"),
        (["--steps", "4", "--stop-at", "4"], "must lie in 1..3"),
        (["--stop-at", "0"], "Nearest: 1."),
    ],
)
def test_bad_options(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, text = verify(capsys, "resume", *DENSE, *words)
    assert code == 2 and named in text
