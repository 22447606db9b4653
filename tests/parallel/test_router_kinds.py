"""Every kind of router and the shared expert in every kind of layout: a step against one process.

With biases of experts two steps are taken: the second one chooses by what the first one moved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mtk.config.pretrain import PretrainConfig
from mtk.models import balance, moe, router
from mtk.models.moe import MoE
from mtk.parallel import expert
from mtk.parallel.expert import SharedRegion
from mtk.parallel.pieces import Piece
from mtk.training import expert_balance
from mtk.training.expert_balance import ExpertBalance
from mtk.verification.compare import compare
from mtk.verification.observe import Observation
from tests.parallel.layouts import configure, difference, one_process, step_on_rank
from tests.parallel.ranks import run_ranks

TP, EP, SP = "tensor_model_parallel_size", "expert_model_parallel_size", "sequence_parallel"
PP, CP = "pipeline_model_parallel_size", "context_parallel_size"
SHARDING = "data_parallel_sharding"

BIASED: dict[str, Any] = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    # Much, so that the second step chooses otherwise.
    "moe_router_bias_update_rate": 0.05,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_shared_expert_intermediate_size": 24,
    "moe_layer_freq": "[0]+[1]*3",
}
KINDS: dict[str, dict[str, Any]] = {
    "biased": BIASED,
    "biased, groups, capacity": {
        **BIASED,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_expert_capacity_factor": 0.75,
    },
    "sinkhorn": {
        "moe_router_load_balancing_type": "sinkhorn",
        "moe_aux_loss_coeff": None,
        "moe_router_pre_softmax": True,
        "moe_expert_capacity_factor": 1.0,
    },
    "shared, gated": {
        "moe_router_pre_softmax": True,
        "moe_shared_expert_intermediate_size": 40,
        "moe_shared_expert_gate": True,
    },
}
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {TP: 2}),
    (2, {TP: 2, SP: True}),
    (2, {EP: 2}),
    (2, {PP: 2}),
    (2, {SHARDING: "optimizer"}),
    (2, {CP: 2, EP: 2}),
    (4, {CP: 2, TP: 2, SP: True}),
    (4, {EP: 2, TP: 2, SP: True, SHARDING: "full"}),
    (4, {EP: 2, PP: 2, "recompute_granularity": "full", "recompute_method": "uniform"}),
]


def kind_run(world: int, kind: Mapping[str, Any], **layout: Any) -> PretrainConfig:
    values = {
        "num_experts": 8,
        "moe_ffn_hidden_size": 32,
        "moe_aux_loss_coeff": 0.3,
        "moe_z_loss_coeff": 0.03,
        # Routers decide, so that rounding does not.
        "init_method_std": 0.2,
        **kind,
    }
    own = {f"model.{name}": value for name, value in values.items()} | {"optimizer.adam_eps": 1e-4}
    return configure("llama", world, own, **layout)


def steps_of(kind: str) -> int:
    return 2 if "biased" in kind else 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("world", "layout"),
    [pytest.param(*case, marks=pytest.mark.slow if case[0] > 2 else ()) for case in LAYOUTS],
    ids=str,
)
def test_a_step_equals_one_process(world: int, layout: dict[str, Any], kind: str) -> None:
    config = kind_run(world, KINDS[kind], **layout)
    found = difference(config, steps_of(kind))
    assert found.failures == []
    biases = [name for name in found.weights if name.endswith("expert_bias")]
    assert len(biases) == (3 if "biased" in kind else 0)


def test_biases_moved_and_decided() -> None:
    """What the tests above compare is not nothing."""
    config = kind_run(1, BIASED)
    one, two = one_process(config, 1), one_process(config, 2)
    for observation, most in ((one, 1), (two, 2)):
        for _, _, array in observation.buffers:
            moved = torch.from_numpy(array) / 0.05
            assert torch.allclose(moved, moved.round()) and moved.abs().max() == most
    assert one.balance[3] == 0 and two.balance[3] == pytest.approx(0.1)
    assert one.balance[2] > 0.3
    fixed = kind_run(1, {**BIASED, "moe_router_bias_update_rate": 0.0})
    assert one_process(fixed, 2).loss != two.loss


def test_sinkhorn_in_training_only_and_more_even() -> None:
    even = one_process(kind_run(1, KINDS["sinkhorn"]), 1)
    loose = one_process(
        kind_run(1, {**KINDS["sinkhorn"], "moe_router_load_balancing_type": "none"}), 1
    )
    assert even.balance[2] < 0.5 * loose.balance[2]
    assert even.loss != loose.loss


# -- seeded faults ------------------------------------------------------------------------


def _replace(target: Any, name: str, value: Any) -> None:
    setattr(target, name, value)


def _counts_of_this_rank() -> None:
    original = ExpertBalance.figures

    def figures(self: ExpertBalance, whole: Tensor) -> Tensor:
        out = original(self, whole)
        own = torch.zeros_like(self._chosen_LX)
        for record in self._records:
            own += record.chosen(own.device)
        self._chosen_LX = own
        return out

    _replace(ExpertBalance, "figures", figures)


def _bias_in_the_weights() -> None:
    original = router._weights

    def choose(logits: Tensor, how: Any, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            chosen = router._compared(logits, how, shift).topk(how.k, dim=-1).indices
        return original(logits if shift is None else logits + shift, chosen, how), chosen

    _replace(moe, "choose", choose)


def _never_moved() -> None:
    _replace(expert_balance, "move_biases", lambda *given: None)


def _moved_the_wrong_way() -> None:
    def move(biases: Any, chosen_LX: Tensor, rate: float) -> None:
        balance.move_biases(biases, chosen_LX, -rate)

    _replace(expert_balance, "move_biases", move)


def _biases_of_the_next_layer() -> None:
    def move(biases: Any, chosen_LX: Tensor, rate: float) -> None:
        balance.move_biases(biases, chosen_LX.roll(1, 0), rate)

    _replace(expert_balance, "move_biases", move)


def _shared_after_the_sum() -> None:
    """Every tensor-parallel rank adds its part to what is already summed."""
    original = MoE.forward

    def forward(self: MoE, x: Tensor) -> Tensor:
        shared, self.shared = self.shared, None
        out = original(self, x)
        self.shared = shared
        return out if shared is None else out + shared(x)

    _replace(MoE, "forward", forward)


def _gate_gradient_of_one_part() -> None:
    original = expert._cut_shared

    def cut(shared: Any, name: str, tp: Any, pieces: dict[str, Piece]) -> None:
        original(shared, name, tp, pieces)
        gate = f"{name}.token_gate.weight"
        pieces[gate] = dataclasses.replace(pieces[gate], partial=())

    _replace(expert, "_cut_shared", cut)


def _sinkhorn_of_own_chunks() -> None:
    def sequences(self: SharedRegion, x_NX: Tensor, length: int) -> Tensor:
        return x_NX.view(-1, length, x_NX.shape[1])

    _replace(SharedRegion, "sequences", sequences)


FAULTS: dict[str, tuple[str, dict[str, Any], Callable[[], None]]] = {
    "biases move by this rank's counts": ("biased", {SHARDING: "optimizer"}, _counts_of_this_rank),
    "biases weigh": ("biased", {EP: 2}, _bias_in_the_weights),
    "biases stay": ("biased", {EP: 2}, _never_moved),
    "biases move the wrong way": ("biased", {PP: 2}, _moved_the_wrong_way),
    "biases of another layer": ("biased", {PP: 2}, _biases_of_the_next_layer),
    "shared expert added after the sum": ("shared, gated", {TP: 2}, _shared_after_the_sum),
    "gradient of the gate in parts": ("shared, gated", {TP: 2}, _gate_gradient_of_one_part),
    "Sinkhorn of chunks": ("sinkhorn", {CP: 2}, _sinkhorn_of_own_chunks),
}


def faulty_step(rank: int, config: PretrainConfig, fault: str, steps: int) -> Observation:
    FAULTS[fault][2]()
    return step_on_rank(rank, config, 2, steps)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault: str) -> None:
    kind, layout, _ = FAULTS[fault]
    config = kind_run(2, KINDS[kind], **layout)
    steps = steps_of(kind)
    one = one_process(dataclasses.replace(config, parallel=type(config.parallel)()), steps)
    try:
        failures = compare(one, run_ranks(2, faulty_step, config, fault, steps)).failures
    except (AssertionError, ValueError) as error:
        failures = [str(error)]
    assert failures != []
