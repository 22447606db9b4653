"""Deterministic mode, and recomputation, as a whole run shows them: equal checkpoint bytes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.artifacts.hashing import sha256_file
from mtk.checkpoint import complete_steps
from mtk.config.pretrain import RuntimeConfig
from mtk.errors import ConfigError
from mtk.parallel.deterministic import set_deterministic
from stages.pretrain import run
from tests.training.test_pretrain import QUIET, config


@pytest.fixture(autouse=True)
def everything_as_before() -> Iterator[None]:
    """The mode belongs to the process; other tests get it as it was."""
    names = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    yield
    set_deterministic(RuntimeConfig())
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(saved)


def checkpoint(folder: Path, **changes: Any) -> dict[str, str]:
    """SHA-256 of every file of the last checkpoint but its manifest, which has times in it."""
    run(config(folder, train_iters=8, **changes), QUIET)
    newest = folder / f"step_{complete_steps(folder)[-1]:08}"
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(newest)): sha256_file(path)
        for path in files
        if path.name != "artifact.json"
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_runs_give_identical_checkpoints(tmp_path: Path, precision: str) -> None:
    changes = {
        "deterministic_mode": True,
        "precision": precision,
        "recompute_granularity": "selective",
    }
    first = checkpoint(tmp_path / "run", **changes)
    assert torch.are_deterministic_algorithms_enabled()
    shutil.rmtree(tmp_path / "run")  # the path is part of the saved configuration
    assert len(first) >= 3 and first == checkpoint(tmp_path / "run", **changes)


def test_recomputation_changes_no_bit_of_a_run(tmp_path: Path) -> None:
    plain = checkpoint(tmp_path / "plain")
    for method in ("uniform", "block"):
        changes = {"recompute_granularity": "full", "recompute_method": method}
        again = checkpoint(tmp_path / method, **changes)
        tensors = {name: digest for name, digest in again.items() if "safetensors" in name}
        assert len(tensors) >= 2 and tensors.items() <= plain.items()


def test_the_mode_sets_what_torch_and_its_libraries_read() -> None:
    environment: dict[str, str] = {}
    set_deterministic(RuntimeConfig(deterministic_mode=True), environment)
    assert environment == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    set_deterministic(RuntimeConfig(), environment)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


def test_what_was_chosen_outside_is_kept_where_it_is_fit() -> None:
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "NCCL_ALGO": "Tree"}
    set_deterministic(RuntimeConfig(deterministic_mode=True), environment)
    assert environment == {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "NCCL_ALGO": "Tree"}


def test_all_conflicts_are_named_and_nothing_is_changed() -> None:
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":0:0", "NCCL_ALGO": "NVLS"}
    with pytest.raises(ConfigError) as error:
        set_deterministic(RuntimeConfig(deterministic_mode=True), environment)
    assert [problem.key for problem in error.value.problems] == [*environment]
    assert "export NCCL_ALGO=Ring" in str(error.value) and error.value.exit_code == 2
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_compiler_that_times_its_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = RuntimeConfig(deterministic_mode=True, compile=True)
    monkeypatch.setattr("mtk.parallel.deterministic._inductor_config", object)
    with pytest.raises(ConfigError, match="--compile"):
        set_deterministic(compiled, {})


def test_a_compiler_that_can_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Settings:
        deterministic = False

    settings = Settings()
    monkeypatch.setattr("mtk.parallel.deterministic._inductor_config", lambda: settings)
    set_deterministic(RuntimeConfig(deterministic_mode=True, compile=True), {})
    assert settings.deterministic


def test_too_late_for_nccl_is_an_error_of_the_programmer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtk.parallel.deterministic._nccl_started", lambda: True)
    with pytest.raises(ValueError, match="before the process group"):
        set_deterministic(RuntimeConfig(deterministic_mode=True), {})
    set_deterministic(RuntimeConfig(deterministic_mode=True), {"NCCL_ALGO": "Ring"})
