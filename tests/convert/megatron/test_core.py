"""Against Megatron-core's own model: its checkpoints read, and what mtk writes loaded strictly."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mtk.convert.megatron.argument_writing import write_arguments
from mtk.convert.megatron.writing import padded_rows
from tests.convert.megatron.core_process import TOKENS_BS
from tests.convert.megatron.natives import MODELS, logits, save, to_megatron, to_native

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"
    ),
]
LIMIT = 1e-4
# Its local layers have no norms around zero, which are Transformer Engine's.
HELD = [name for name in MODELS if name != "zero-centred"]


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each model: ``NAME-ours`` written by mtk, ``NAME-theirs`` made by Megatron-core, and
    Megatron-core's logits of both."""
    folder = tmp_path_factory.mktemp("core")
    jobs = folder / "jobs"
    jobs.mkdir()
    for name in HELD:
        config = MODELS[name]
        sizes = json.dumps(write_arguments(config, padded_rows(config, 1), 1, 1))
        (jobs / f"{name}-theirs.json").write_text(sizes)
        (jobs / f"{name}-ours.json").write_text(sizes)
        native = save(folder / name, config)
        written = to_megatron(native, folder / f"{name}-m", 1, 1, target_transformer_impl="local")
        shutil.copytree(written, jobs / f"{name}-ours")
    command = [sys.executable, "-m", "tests.convert.megatron.core_process", str(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", HELD)
def test_megatron_core_loads_what_mtk_writes(name: str, core: Path) -> None:
    ours = logits(core / name)
    theirs = torch.load(core / "jobs" / f"{name}-ours.pt", weights_only=True)
    assert theirs.shape[-1] == padded_rows(MODELS[name], 1)
    assert (ours - theirs[..., : ours.shape[-1]]).abs().max() <= LIMIT


@pytest.mark.parametrize("name", HELD)
def test_mtk_reads_what_megatron_core_writes(name: str, core: Path, tmp_path: Path) -> None:
    native = to_native(core / "jobs" / f"{name}-theirs", tmp_path / "native")
    theirs = torch.load(core / "jobs" / f"{name}-theirs.pt", weights_only=True)
    ours = logits(native)
    assert ours.shape[:2] == TOKENS_BS.shape
    assert ours.std() > 0.1
    assert (ours - theirs[..., : ours.shape[-1]]).abs().max() <= LIMIT
