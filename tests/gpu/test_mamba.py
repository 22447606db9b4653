"""Mamba layers on CUDA: equal to the CPU in fp32, close in bf16, the same when compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.models.ssd import chunked
from tests.gpu.test_training import COMPILER, losses

HYBRID: dict[str, Any] = {
    "num_layers": 4,
    "hybrid_layer_pattern": "M-M*",
    "position_embedding_type": "none",
    "mamba_head_dim": 32,
    "mamba_state_dim": 64,
    "mamba_chunk_size": 64,
}


def test_the_scan_equals_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    x, b, c = (
        torch.empty(2, 300, *size).normal_(generator=generator)
        for size in ((8, 32), (2, 64), (2, 64))
    )
    dt = torch.empty(2, 300, 8).uniform_(0.001, 0.5, generator=generator)
    a, skip = -torch.linspace(0.1, 16, 8), torch.ones(8)
    documents = (torch.rand(2, 300, generator=generator) < 0.02).cumsum(1)
    given = (x, dt, a, b, c, skip)
    y, last = chunked(*given, chunk=64, documents_BS=documents)
    on_gpu = (t.cuda() for t in given)
    gpu, gpu_last = chunked(*on_gpu, chunk=64, documents_BS=documents.cuda())
    torch.testing.assert_close(gpu.cpu(), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gpu_last.cpu(), last, rtol=1e-4, atol=1e-4)


def test_fp32_equals_the_cpu(tmp_path: Path) -> None:
    gpu = losses(tmp_path / "gpu", device="cuda", **HYBRID)
    cpu = losses(tmp_path / "cpu", device="cpu", **HYBRID)
    assert gpu == pytest.approx(cpu, rel=2e-4)


@pytest.mark.parametrize(
    "changes",
    [{}, {"recompute_granularity": "selective"}, pytest.param({"compile": True}, marks=COMPILER)],
    ids=str,
)
def test_bf16_follows_fp32(tmp_path: Path, changes: dict[str, Any]) -> None:
    exact = losses(tmp_path / "fp32", device="cuda", **HYBRID)
    low = losses(tmp_path / "bf16", device="cuda", precision="bf16", **HYBRID, **changes)
    assert low == pytest.approx(exact, rel=2e-2)
