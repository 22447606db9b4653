"""Benchmarks of memory: counting, theory, and the variants of recomputation."""

from __future__ import annotations

import pytest
import torch

from mtk.benchmarks.alive import Alive
from mtk.benchmarks.optimizer_memory import bench_optimizer_memory, theory
from mtk.benchmarks.recomputation import bench_recompute, variants
from mtk.config import make
from mtk.config.bench import OptimizerMemoryConfig, RecomputeBenchConfig
from mtk.errors import ConfigError
from mtk.log import Reporter
from tests.benchmarks.test_layouts import TINY


def test_counting() -> None:
    with Alive() as alive:
        kept = torch.zeros(10_000)
        view = kept[5:]
        assert alive.bytes() == 40_000
        alive.begin()
        torch.ones(20_000)
        assert (alive.bytes(), alive.peak) == (40_000, 120_000)
        kept.untyped_storage().resize_(0)
        alive.begin()
        assert (alive.bytes(), alive.peak, view.storage_offset()) == (0, 0, 5)


@pytest.mark.parametrize(
    ("precision", "sharding", "ranks", "expected"),
    [
        ("fp16", "replicate", 4, 20.0),
        ("fp16", "optimizer", 4, 8.0),
        ("bf16", "replicate", 2, 18.0),
        ("bf16", "optimizer", 4, 9.0),
        ("fp32", "optimizer", 8, 9.0),
        ("bf16", "full", 4, 4.5),
    ],
)
def test_theory(precision: str, sharding: str, ranks: int, expected: float) -> None:
    assert theory(precision, sharding, ranks) == expected


@pytest.mark.slow
def test_two_ranks_hold_what_theory_says() -> None:
    config = make(
        OptimizerMemoryConfig,
        ranks=(2,),
        precisions=("bf16",),
        shardings=("optimizer", "full"),
        num_layers=12,
        hidden_size=64,
    )
    held, full = bench_optimizer_memory(config, Reporter(quiet=True))
    assert held.within and full.within
    # A step of one micro-batch holds no whole gradients; more of them do, in fp32.
    assert held.peak < held.held_peak < 1.2 * held.theory
    # Full sharding holds neither weights nor gradients whole, whatever the micro-batches; only
    # the shard in which gradients add up stays, 4 bytes over 2 ranks.
    assert full.held_peak < full.peak + 2.1 < held.held_peak - 1
    assert held.shard_peak < held.theory


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="power of 2"):
        make(OptimizerMemoryConfig, ranks=(3,))
    with pytest.raises(ConfigError, match="one device"):
        make(RecomputeBenchConfig, **TINY, nproc=2)


@pytest.mark.slow
def test_recompute_times_on_the_cpu() -> None:
    names = [name for name, _ in variants(4)]
    assert names == [
        "none",
        "selective",
        "full uniform 1",
        "full uniform 2",
        "full uniform 4",
        "full block 2",
    ]
    config = make(RecomputeBenchConfig, **{**TINY, "num_layers": 1}, attention=("math",))
    rows = bench_recompute(config, Reporter(quiet=True))
    assert [row.variant for row in rows] == [name for name, _ in variants(1)]
    assert [row.failure for row in rows] == [""] * len(rows)
    assert all(row.step_seconds for row in rows)
    none, selective, *full = rows
    assert none.formula_activations > selective.formula_activations
    assert all(row.formula_activations > 0 for row in full)
