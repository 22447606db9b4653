"""The benchmark of families: a complete run of one, and what counts as a failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtk.benchmarks.families.layouts import LOSS_TOLERANCE, LayoutCell
from mtk.benchmarks.families.resume import ResumeCell
from mtk.benchmarks.families.training import Curve
from mtk.cli.main import main
from mtk.config import make
from mtk.config.family_samples import FAMILY_SAMPLES, FamilySample
from mtk.config.pretrain import PretrainConfig
from mtk.convert.families import FAMILIES, family_for
from mtk.verification.compare import Difference, Tolerance


def bench(output: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and the row of the only family."""
    code = main(["bench", "families", "--output", str(output), *words])
    found: dict[str, Any] = json.loads((output / "families.json").read_text())
    [row] = found["families"]
    return code, row


def test_a_loss_above_the_bound_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--family", "gpt2", "--steps", "10", "--checks", "overfit", "resume"]
    code, row = bench(tmp_path, *words)
    assert code == 5
    [failure] = row["failures"]
    assert failure.startswith("overfit: loss 5.") and "after 10 steps, bound 0.3" in failure
    assert row["resume"]["sha256"] == row["resume"]["sha256_continued"]
    assert any(name.startswith("optimizer-") for name in row["resume"]["sha256"])
    for name in ("curves.png", "gpt2.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr()
    assert "same bytes" in said.out and "gpt2: overfit: loss 5." in said.err


@pytest.mark.slow
def test_a_family_learns_its_text(tmp_path: Path) -> None:
    code, row = bench(tmp_path, "--family", "mamba2", "--checks", "overfit")
    assert code == 0 and row["failures"] == []
    losses = [loss for _, loss in row["overfit"]["curve"]]
    assert losses[0] > 4.5 and losses[-1] < 0.3
    assert row["layouts"] == {} and row["resume"] is None


@pytest.mark.slow
def test_experts_on_two_ranks_and_what_stays(tmp_path: Path) -> None:
    for name, check in (("sinkhorn", "layouts"), ("glm4_moe", "resume")):
        words = ["--family", name, "--checks", check]
        assert main(["bench", "families", "--output", str(tmp_path), *words]) == 0
    found = json.loads((tmp_path / "families.json").read_text())["families"]
    # In the order of the table, whichever came first.
    assert [row["family"] for row in found] == ["glm4_moe", "sinkhorn"]
    assert found[0]["resume"] is not None and found[0]["layouts"] == {}
    layouts = found[1]["layouts"]
    assert list(layouts) == ["tp2", "pp2", "dp2", "ep2"]
    for cell in layouts.values():
        assert len(cell["losses_on_text"]) == 20
        assert cell["loss_on_text"] < LOSS_TOLERANCE and cell["worst_gradient"][1] < 1e-5


def test_forgotten_random_states_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtk.training.state.restore_random", lambda *_: None)
    code, row = bench(tmp_path, "--family", "gpt2", "--checks", "resume")
    assert code == 5 and row["failures"][0].startswith("resume: model: ")


def test_cells_that_failed() -> None:
    equal = Difference(0.0, 0.0, {"w": 1e-7}, {"w": 0.0}, Tolerance())
    other = Difference(0.0, 0.0, {"w": 1e-3}, {"w": 0.0}, Tolerance())
    assert LayoutCell("tp2", equal, [1.0], 0.0).failures == []
    assert "gradient of w" in LayoutCell("tp2", other, [1.0], 0.0).failures[0]
    for error in (2 * LOSS_TOLERANCE, float("nan"), float("inf")):
        assert "1 steps on the text" in LayoutCell("tp2", equal, [1.0], error).failures[0]
    assert ResumeCell({"model": "a"}, {"model": "a"}, []).failures == []
    assert ResumeCell({"model": "a"}, {"model": "b"}, []).failures == ["resume: model differ"]
    assert Curve([(10, 0.2)], 0.3, 1.0).failures == []
    assert Curve([(10, float("nan"))], 0.3, 1.0).failures


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--family", "gtp2"], "Nearest: gpt2."),
        (["--checks", "resumes"], "Nearest: resume."),
        (["--steps", "0"], "must be at least 1"),
    ],
)
def test_bad_options(
    words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "families", "--output", str(tmp_path / "x"), *words]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("sample", FAMILY_SAMPLES.values(), ids=lambda sample: sample.name)
def test_samples_are_what_they_are_called(sample: FamilySample) -> None:
    values = {**sample.options, "vocab_size": 384, "mock_data": True, "train_iters": 1}
    model = make(PretrainConfig, **values, save="unused").model
    assert sample.has_experts == bool(model.num_experts)
    assert (model.family in ("bert", "t5")) == (sample.data == "sentences")
    if sample.hf is not None:
        assert family_for(model, sample.hf).model_type == sample.hf


def test_every_foreign_family_has_a_sample() -> None:
    assert {family.model_type for family in FAMILIES} <= {s.hf for s in FAMILY_SAMPLES.values()}
