"""Delayed weight gradients of stages that FSDP shards add up in fp32, as all others do."""

from __future__ import annotations

import pytest

from mtk.verification.layout import in_one_process
from mtk.verification.observe import join
from tests.parallel.layouts import configure, one_process, step_on_rank
from tests.parallel.ranks import run_ranks

BF16 = {"precision.precision": "bf16", "batch.global_batch_size": 16}


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["optimizer", "full"])
@pytest.mark.parametrize("overlap", [True, False])
def test_bf16_gradients_equal_those_of_1f1b(sharding: str, overlap: bool) -> None:
    found = []
    for schedule in ("1f1b", "zero-bubble"):
        config = configure(
            "llama",
            4,
            BF16,
            pipeline_model_parallel_size=2,
            pipeline_schedule=schedule,
            data_parallel_sharding=sharding,
            overlap_grad_reduce=overlap,
        )
        found.append(run_ranks(4, step_on_rank, config, 4))
    shapes = {
        name: block.shape for name, _, block in one_process(in_one_process(config), 1).weights
    }
    expected, delayed = (join((rank.gradients for rank in ranks), shapes) for ranks in found)
    top = max(float(gradient.abs().max()) for gradient in expected.values())
    # The same bf16 shares of each micro-batch; only the order of their fp32 sum differs.
    errors = {n: float((delayed[n] - expected[n]).abs().max()) / top for n in shapes}
    assert max(errors.values()) < 1e-6, errors
