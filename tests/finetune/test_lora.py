"""Low-rank adapters: frozen base, the same in every layout, merged without a difference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import mtk.models.lora
from mtk.config import make
from mtk.config.lora import LoraConfig
from mtk.config.model import ModelConfig
from mtk.config.optimization import OptimizerConfig
from mtk.config.parallel import ParallelConfig
from mtk.config.pretrain import PretrainConfig
from mtk.errors import ConfigError
from mtk.models.build import build_model
from mtk.models.init import initial_value, initialize, normal_weight
from mtk.models.lora import adapted_weight, is_adapter, merged
from mtk.parallel.dims import Dims
from mtk.parallel.grads import total_norm
from mtk.parallel.ranks import Ranks, make_ranks
from mtk.parallel.tensor import Cutter, RowParallelLinear
from mtk.precision.main_weights import MainWeights
from mtk.training.optimizer import Optimizer
from mtk.verification.compare import compare
from mtk.verification.observe import Observation, observe, random_sample
from tests.models.sizes import llama_config, small_config, small_model
from tests.parallel.layouts import configure
from tests.parallel.ranks import run_ranks

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LORA = {"lora_rank": 3, "lora_alpha": 6.0, "lora_targets": "all"}


def adapted(base: ModelConfig, **changes: Any) -> ModelConfig:
    return make(ModelConfig, **{**vars(base), "lora": {**LORA, **changes}})


@pytest.mark.parametrize("base", [small_config(), llama_config()], ids=["gpt2", "llama"])
def test_step_zero_is_the_base_bit_for_bit(base: ModelConfig) -> None:
    plain = small_model(base)
    model = build_model(adapted(base))
    initialize(model, model.config, 1)
    model.load_state_dict(plain.state_dict(), strict=False)
    tokens = torch.arange(40).view(2, 20)
    assert torch.equal(model.eval()(tokens), plain.eval()(tokens))


def test_only_adapters_are_trained_and_merge_exactly() -> None:
    config = adapted(llama_config())
    model = build_model(config)
    initialize(model, config, 1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if is_adapter(name)}
    assert len(trained) == 2 * 7 * config.num_layers
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).normal_(generator=torch.Generator().manual_seed(len(name)))
    plain = small_model(llama_config())
    weights = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(weights[name])
    for name in (n for n in trained if n.endswith(".a")):
        target = adapted_weight(name)
        parts = weights[name], weights[name.removesuffix("a") + "b"]
        whole = merged(weights[target], *parts, config.lora.scale)
        plain.get_parameter(target).data.copy_(whole)
    tokens = torch.arange(40).view(2, 20)
    out, expected = plain.eval()(tokens), model.eval()(tokens)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


SLOW = pytest.mark.slow


@pytest.mark.parametrize("kind", [pytest.param("gpt2", marks=SLOW), "llama"])
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(2, {TP: 2}, marks=SLOW),
        (2, {TP: 2, "sequence_parallel": True}),
        (4, {TP: 4, "sequence_parallel": True}),  # ranks share key/value heads
        pytest.param(2, {PP: 2}, marks=SLOW),
        pytest.param(2, {PP: 2, "pipeline_schedule": "zbv"}, marks=SLOW),
        (2, {"context_parallel_size": 2}),
        (2, {"data_parallel_sharding": "replicate"}),
        pytest.param(2, {"data_parallel_sharding": "optimizer"}, marks=SLOW),
        (2, {"data_parallel_sharding": "full"}),
        (4, {TP: 2, PP: 2, "pipeline_schedule": "zero-bubble"}),
        pytest.param(
            4, {TP: 2, "sequence_parallel": True, "data_parallel_sharding": "full"}, marks=SLOW
        ),
        pytest.param(
            2,
            {PP: 2, "recompute_granularity": "full", "recompute_method": "uniform"},
            marks=SLOW,
        ),
    ],
    ids=str,
)
def test_equals_one_process(kind: str, world: int, layout: dict[str, Any]) -> None:
    config = configure(kind, world, **layout)
    model = dataclasses.replace(config.model, lora=make(LoraConfig, **LORA))
    config = dataclasses.replace(config, model=model)
    single = dataclasses.replace(config, parallel=make(ParallelConfig))
    ranks = run_ranks(world, step_on_rank, config, world)
    assert compare(step_on_rank(0, single, 1), ranks).failures == []


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "gradients of copies are not summed": lambda patch: patch.setattr(
        Cutter, "_in_parts", lambda self, name: None
    ),
    "the adapter is added on every rank": lambda patch: patch.setattr(
        RowParallelLinear, "forward", _added_after_the_sum
    ),
    "alpha / rank is left out": lambda patch: patch.setattr(LoraConfig, "scale", 1.0),
    "the base is trained too": lambda patch: patch.setattr(
        mtk.models.lora, "is_adapter", lambda name: True
    ),
}


def _added_after_the_sum(self: RowParallelLinear, x: torch.Tensor) -> torch.Tensor:
    out = self.region.leave(self.product(x, self.weight), self.site)
    out = out if self.bias is None else out + self.bias
    return out if self.lora is None else out + self.lora(x)


@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_faults_are_seen(fault: str) -> None:
    config = configure("llama", 2, tensor_model_parallel_size=2)
    model = dataclasses.replace(config.model, lora=make(LoraConfig, **LORA))
    config = dataclasses.replace(config, model=model)
    single = dataclasses.replace(config, parallel=make(ParallelConfig))
    ranks = run_ranks(2, step_with_fault, config, 2, fault)
    try:
        failures = compare(step_on_rank(0, single, 1), ranks).failures
    except (ValueError, KeyError) as error:
        failures = [str(error)]
    assert failures


def step_with_fault(rank: int, config: PretrainConfig, world: int, fault: str) -> Observation:
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[fault](patch)
        return step_on_rank(rank, config, world)


def step_on_rank(rank: int, config: PretrainConfig, world: int) -> Observation:
    """A step from weights in which no matrix of an adapter is zero."""
    ranks = Ranks()
    if world > 1:
        ranks = make_ranks(
            Dims.of(config.parallel, world),
            rank=rank,
            device=torch.device("cpu"),
            kv_groups=config.model.query_groups,
            sharded=config.parallel.data_parallel_sharding != "replicate",
        )
    return observe(config, random_sample(config), ranks, values=partial(loud_value, config.model))


def loud_value(model: ModelConfig, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if is_adapter(name):
        return normal_weight(name, shape, 0.05, 1)
    return initial_value(name, shape, model, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_rank": 999}, r"lora_rank = 999: exceeds .*Nearest: \d+"),
        ({"lora_rank": 0}, "lora_rank = 0: must be at least 1"),
        ({"lora_alpha": -1}, "greater than 0"),
        ({"lora_dropout": 1.0}, r"must be in \[0, 1\)"),
        ({"lora_rank": None}, "only means something with --lora-rank"),
        ({"lora_targets": "heads"}, "must be one of"),
    ],
)
def test_rules(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        adapted(small_config(), **changes)


def test_experts_have_no_adapters() -> None:
    moe = {"num_experts": 4, "add_bias_linear": False, "hidden_size": 32, "ffn_hidden_size": 32}
    with pytest.raises(ConfigError, match="experts are one grouped matrix multiply"):
        adapted(small_config(**moe))
    assert adapted(small_config(**moe), lora_targets="attention").lora.lora_rank == 3


def test_alpha_is_as_the_rank_unless_given() -> None:
    assert make(LoraConfig, lora_rank=4).scale == 1.0
    assert make(LoraConfig, lora_rank=4, lora_alpha=16).scale == 4.0


def test_a_stage_of_frozen_weights_has_nothing_to_optimise() -> None:
    optimizer = Optimizer(MainWeights({}, torch.float32), make(OptimizerConfig, lr=1.0))
    norm = total_norm([], torch.device("cpu"))
    optimizer.step(norm, 1.0, 1.0, 0.0)
    assert norm == 0 and optimizer.state_tensors() == {}
