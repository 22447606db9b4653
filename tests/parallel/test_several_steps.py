"""Some steps of training with evaluations between them, in a layout and in one process: nothing
that is gathered, held or counted for one step is still there in the next."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from mtk.config import make
from mtk.config.pretrain import PretrainConfig
from mtk.parallel.dims import Dims
from mtk.parallel.ranks import Ranks, make_ranks
from mtk.training.assemble import make_stepper
from mtk.training.batch import GlobalBatch
from mtk.training.evaluate import held_out_loss
from mtk.verification.compare import Difference, Tolerance, compare
from mtk.verification.observe import Observation, owned, random_sample, share
from tests.parallel.layouts import configure
from tests.parallel.ranks import run_ranks

STEPS = 4


def train(config: PretrainConfig, ranks: Ranks) -> tuple[Observation, list[float]]:
    """Steps with other data and other numbers of micro-batches, evaluations after each; the
    figures of all of them, and the state of the last."""
    stepper = make_stepper(config, config.batch.full * 10, ranks)
    micro, figures = config.batch.micro_batch_size, []
    for step in range(STEPS):
        sample = random_sample(config, step)
        count = config.batch.full // (2 if step % 2 else 1)
        batch = share(sample.rows(0, count), micro, ranks.dp.rank, ranks.dp.size)
        result = stepper.step(batch, config.batch.full * step)
        figures += [result.loss.item(), result.norm.item()]
        held = share(random_sample(config, 100), micro, ranks.dp.rank, ranks.dp.size)
        single = [GlobalBatch([found], micro) for found in held.micro_batches]
        figures.append(held_out_loss(stepper.passes, single, ranks, None)["loss"])
    gradients = owned(stepper, stepper.main.gradients)
    weights = owned(stepper, stepper.main.weights)
    return Observation(figures[-3], figures[-2], gradients, weights), figures


def train_on_rank(rank: int, config: PretrainConfig, world: int) -> tuple[Observation, list[float]]:
    ranks = make_ranks(
        Dims.of(config.parallel, world),
        rank=rank,
        device=torch.device("cpu"),
        kv_groups=config.model.query_groups,
        state_groups=config.model.state_groups,
        sharded=config.parallel.data_parallel_sharding != "replicate",
    )
    return train(config, ranks)


def several(config: PretrainConfig, tolerance: Tolerance) -> tuple[Difference, float]:
    """The last step against one process, and the greatest relative error of all figures."""
    single = dataclasses.replace(config, parallel=make(type(config.parallel)))
    one, expected = train(single, Ranks())
    found = run_ranks(config.parallel.nproc, train_on_rank, config, config.parallel.nproc)
    errors = [
        abs(a - b) / abs(b) for _, figures in found for a, b in zip(figures, expected, strict=True)
    ]
    return compare(one, [observation for observation, _ in found], tolerance), max(errors)


FULL, OPTIMIZER = {"data_parallel_sharding": "full"}, {"data_parallel_sharding": "optimizer"}
AT_ONCE = {"overlap_param_gather": False, "overlap_grad_reduce": False}
HYBRID = {"num_distributed_optimizer_instances": 2}
# Biases of keys have five rows: the last of four ranks has none of them.
ODD = {
    "model.hidden_size": 20,
    "model.num_attention_heads": 4,
    "model.num_query_groups": 1,
    "model.ffn_hidden_size": 30,
}
PACKED = {
    "data.reset_attention_mask": True,
    "data.reset_position_ids": True,
    "batch.micro_batch_size": 2,
}
SEQUENCE = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


def _stages(schedule: str) -> dict[str, Any]:
    return {"pipeline_model_parallel_size": 2, "pipeline_schedule": schedule}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "changes", "layout"),
    [
        (4, ODD, OPTIMIZER),
        (4, ODD, OPTIMIZER | AT_ONCE),
        (4, ODD, FULL | HYBRID | AT_ONCE),
        (4, {}, FULL | AT_ONCE | _stages("zero-bubble")),
        (4, {}, OPTIMIZER | AT_ONCE | _stages("zbv")),
        (4, PACKED, SEQUENCE | _stages("zero-bubble")),
        (8, {}, FULL | SEQUENCE | _stages("1f1b")),
        (8, PACKED, FULL | _stages("1f1b") | {"context_parallel_size": 2}),
    ],
    ids=str,
)
def test_equals_one_process(world: int, changes: dict[str, Any], layout: dict[str, Any]) -> None:
    found, figures = several(configure("gpt2", world, changes, **layout), Tolerance(gradient=1e-4))
    assert found.failures == []
    assert figures < 1e-6
