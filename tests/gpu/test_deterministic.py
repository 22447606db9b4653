"""Two runs on CUDA in deterministic mode: identical checkpoints, whatever else is switched on.

Each run is a process of its own, as cuBLAS reads its setting once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mtk.artifacts.hashing import sha256_file

ROOT = Path(__file__).parents[2]
RUN = (
    "-m mtk pretrain --num-layers 4 --hidden-size 256 --num-attention-heads 4 "
    "--num-query-groups 2 --seq-length 256 --vocab-size 1000 --mock-data --train-iters 10 "
    "--micro-batch-size 4 --global-batch-size 8 --lr 1e-3 --save-interval 10 --eval-iters 1 "
    "--no-plots --device cuda --deterministic-mode"
)


def checkpoint(folder: Path, options: str) -> dict[str, str]:
    unset = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, *RUN.split(), *options.split(), "--save", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    step = folder / "step_00000010"
    return {
        str(path.relative_to(step)): sha256_file(path)
        for path in sorted(step.rglob("*"))
        if path.is_file() and path.name != "artifact.json"
    }


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--bf16 --position-embedding-type rope --swiglu --disable-bias-linear",
        "--bf16 --use-flash-attn --recompute-activations",
        "--bf16 --recompute-granularity full --recompute-method uniform --recompute-num-layers 2",
        "--bf16 --compile --hidden-dropout 0 --attention-dropout 0",
        "--bf16 --swiglu --disable-bias-linear --num-experts 16 --moe-router-topk 4 "
        "--moe-router-score-function sigmoid --moe-router-enable-expert-bias "
        "--moe-router-num-groups 4 --moe-router-group-topk 2 --moe-layer-freq [0]+[1]*3 "
        "--moe-shared-expert-intermediate-size 128 --moe-shared-expert-gate",
    ],
)
def test_two_runs_give_identical_checkpoints(tmp_path: Path, options: str) -> None:
    first = checkpoint(tmp_path / "run", options)
    shutil.rmtree(tmp_path / "run")  # the path is part of the saved configuration
    assert len(first) >= 3 and first == checkpoint(tmp_path / "run", options)
