"""Pipeline stages wrapped in FSDP2: gradients equal one process, reduced once a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtk.models.gpt import GPT
from mtk.parallel.collectives import all_reduce
from mtk.parallel.dims import Dims
from mtk.parallel.ranks import Ranks, make_ranks
from tests.parallel.pipelines import (
    CPU,
    Case,
    error,
    loss_over,
    make_batches,
    make_pipeline,
    one_process,
)
from tests.parallel.ranks import run_ranks

CASES = [
    Case("1f1b", (3, 2), 4, tied=True),
    Case("interleaved", (1, 1, 2, 1), 3, tied=False, rope=True),
    Case("zero-bubble", (3, 2), 5, tied=True, rope=True),
    Case("zbv", (1, 2, 1, 1), 4, tied=True),
]


class Reductions(TorchDispatchMode):
    """Counts reduce-scatters."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += "reduce_scatter" in str(func)
        return func(*args, **(kwargs or {}))


def _sharded(model: GPT, ranks: Ranks, *, reshard: bool, dtype: torch.dtype) -> nn.Module:
    mesh = ranks.shards_mesh
    assert mesh is not None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for unit in (*model.layers.values(), model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def _units(stage: nn.Module) -> int:
    """FSDP modules with parameters of their own: all but the root of a middle stage."""
    assert isinstance(stage, GPT)
    return len(stage.layers) + int(stage.first or stage.last)


def _plain(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _equal(rank: int, reshard: bool, dtype: torch.dtype) -> list[tuple[Case, dict[str, float]]]:
    ranks = make_ranks(Dims(dp=2, pp=2), rank=rank, device=CPU)
    wrong = []
    limit = 1e-5 if dtype == torch.float32 else 0.1
    for case in CASES:
        everything = make_batches(2 * case.count)
        total, model = one_process(case.config, everything)
        mine = everything[ranks.dp.rank :: 2]
        whole_loss = loss_over(everything)
        pipeline = make_pipeline(
            case,
            ranks,
            lambda m: _sharded(m, ranks, reshard=reshard, dtype=dtype),
            reshard=reshard,
            dtype=dtype,
        )

        def loss(logits: torch.Tensor, index: int) -> torch.Tensor:
            return whole_loss(logits, 2 * index + ranks.dp.rank)  # noqa: B023

        found = {}
        # The second step shows that the first left nothing behind.
        for step in range(2):
            for _, parameter in pipeline.named_parameters():
                parameter.grad = None
            with Reductions() as counted:
                summed = pipeline.run(mine, loss)
            units = sum(_units(module) for module in pipeline.modules.values())
            if counted.number != units:
                found[f"reductions in step {step}"] = counted.number - units
        wanted = dict(model.named_parameters())
        # A bias of keys moves all scores of a query alike: its gradient is rounding alone.
        full = {
            name: _plain(parameter.grad)
            for name, parameter in pipeline.named_parameters()
            if not name.endswith("key.bias")
        }
        sum_tied_by_name(case, full, ranks)
        found |= {n: e for n in full if not (e := error(full[n], wanted[n].grad)) <= limit}
        if not (e := error(all_reduce(summed, ranks.world, "test"), total)) <= limit / 10:
            found["loss"] = e
        if found:
            wrong.append((case, found))
    return wrong


def sum_tied_by_name(case: Case, full: dict[str, torch.Tensor | None], ranks: Ranks) -> None:
    if case.tied and case.schedule != "zbv":
        name = "embedding.tokens.weight"
        full[name] = all_reduce(full[name], ranks.ends, "ends.tied")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reshard", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)]
)
def test_pipeline_of_sharded_stages(reshard: bool, dtype: torch.dtype) -> None:
    for wrong in run_ranks(4, _equal, reshard, dtype):
        assert wrong == []
