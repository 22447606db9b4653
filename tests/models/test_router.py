"""Routers by their formulas and against transformers'; Sinkhorn, biases and shared experts of a
layer.

Shape suffixes: as in ``mtk.models.router``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mtk.models.balance import max_violation, move_biases
from mtk.models.buffers import kept_buffers, kept_tensors
from mtk.models.init import initial_value
from mtk.models.router import Router, Routing, choose, probabilities
from mtk.models.sinkhorn import sinkhorn
from tests.models.sizes import small_model
from tests.models.test_moe import CPU, by_loop, config, gradients, layer, layer_of, states

DEEPSEEK: dict[str, Any] = {
    "moe_router_topk": 4,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
}


def logits(seed: int = 0, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(50, 8, generator=generator)


def routing(**changes: Any) -> Routing:
    return Routing.of(config(**changes))


def test_softmax_over_the_chosen_and_over_all() -> None:
    chosen_weights, chosen = choose(logits(), routing())
    all_weights, same = choose(logits(), routing(moe_router_pre_softmax=True))
    assert torch.equal(chosen, same)
    torch.testing.assert_close(all_weights, logits().softmax(-1).topk(2).values)
    normalised = all_weights / all_weights.sum(-1, keepdim=True)
    torch.testing.assert_close(chosen_weights, normalised)
    one, _ = choose(logits(), routing(moe_router_topk=1))
    torch.testing.assert_close(one, logits().softmax(-1).amax(-1, keepdim=True))
    scaled, _ = choose(logits(), routing(moe_router_topk_scaling_factor=3.0))
    torch.testing.assert_close(scaled, 3.0 * chosen_weights)


def test_sigmoids_add_up_to_one_whatever_their_size() -> None:
    """Megatron adds 1e-20 to the sum, and DeepSeek too: then they vanish together."""
    how = routing(moe_router_score_function="sigmoid", moe_router_topk=3)
    for shift in (0.0, -30.0, -200.0, 30.0):
        x = (logits() + shift).requires_grad_()
        weights, chosen = choose(x, how)
        torch.testing.assert_close(weights.sum(-1), torch.ones(50))
        assert torch.equal(chosen, logits().topk(3).indices)
        exact = (logits().double() + shift).sigmoid().gather(-1, chosen)
        exact = exact / exact.sum(-1, keepdim=True)
        torch.testing.assert_close(weights.double(), exact, rtol=1e-4, atol=1e-6)
        shares = probabilities(x, how)
        torch.testing.assert_close(shares.sum(-1), torch.ones(50))
        (weights * weights).sum().backward()
        assert x.grad is not None and torch.isfinite(x.grad).all()
    single, _ = choose(logits(), routing(moe_router_score_function="sigmoid", moe_router_topk=1))
    torch.testing.assert_close(single, logits().sigmoid().amax(-1, keepdim=True))


def test_the_aux_loss_of_sigmoids_cannot_be_lowered_by_making_them_vanish() -> None:
    """Megatron-LM issue 1545."""
    values = []
    for offset in (0.0, -80.0):
        made = layer(moe_router_score_function="sigmoid").train()
        made.balance.begin(CPU, samples=3, tokens=72, loss_scale=1.0)
        original = made.router.forward
        made.router.forward = lambda x, o=offset, f=original: f(x) + o  # type: ignore[method-assign]
        made(states().requires_grad_()).sum().backward()
        values.append(2 * made.balance.means()[0].item())
    assert min(values) > 0.95


def test_biases_choose_and_do_not_weigh() -> None:
    how = routing(moe_router_score_function="sigmoid", moe_router_topk=3)
    bias = torch.tensor([5.0, 0, 0, 0, 0, 0, 0, -5.0])
    weights, chosen = choose(logits(), how, bias)
    assert (chosen == 0).any(-1).all() and not (chosen == 7).any()
    scores = logits().sigmoid().gather(-1, chosen)
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))


def by_groups(scores_NX: Tensor, groups: int, kept: int, k: int) -> list[list[int]]:
    """The experts of each token, sorted; by a plain loop."""
    found = []
    for row in scores_NX.tolist():
        size = len(row) // groups
        members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
        members.sort(key=lambda m: -sum(sorted((row[e] for e in m), reverse=True)[: k // kept]))
        allowed = [e for m in members[:kept] for e in m]
        found.append(sorted(sorted(allowed, key=lambda e: -row[e])[:k]))
    return found


@pytest.mark.parametrize(("groups", "kept", "k"), [(4, 2, 4), (4, 4, 4), (2, 1, 3), (8, 2, 2)])
@pytest.mark.parametrize("sigmoid", [True, False])
def test_groups(groups: int, kept: int, k: int, sigmoid: bool) -> None:
    kind = {"moe_router_score_function": "sigmoid"} if sigmoid else {"moe_router_pre_softmax": True}
    how = routing(
        **kind, moe_router_topk=k, moe_router_num_groups=groups, moe_router_group_topk=kept
    )
    scores = logits().sigmoid() if sigmoid else logits().softmax(-1)
    _, chosen = choose(logits(), how)
    assert chosen.sort(-1).values.tolist() == by_groups(scores, groups, kept, k)


@pytest.mark.parametrize("grouped", [True, False])
def test_equals_transformers_deepseek_v3(grouped: bool) -> None:
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    groups = {"moe_router_num_groups": 4, "moe_router_group_topk": 2} if grouped else {}
    made = Router(config(**DEEPSEEK, **groups))
    theirs = deepseek.DeepseekV3TopkRouter(
        deepseek.DeepseekV3Config(
            hidden_size=32,
            n_routed_experts=8,
            num_experts_per_tok=4,
            routed_scaling_factor=2.5,
            n_group=4 if grouped else 1,
            topk_group=2 if grouped else 1,
        )
    )
    assert made.expert_bias is not None
    with torch.no_grad():
        made.weight.normal_(generator=torch.Generator().manual_seed(2))
        made.expert_bias.copy_(torch.linspace(-0.2, 0.3, 8))
        theirs.weight.copy_(made.weight)
        theirs.e_score_correction_bias.copy_(made.expert_bias)
    x_NE = states().flatten(0, 1)
    weights, chosen = choose(made(x_NE), Routing.of(config(**DEEPSEEK, **groups)), made.expert_bias)
    _, their_weights, their_chosen = theirs(x_NE)
    ours = torch.zeros(len(x_NE), 8).scatter(1, chosen, weights)
    torch.testing.assert_close(
        ours, torch.zeros(len(x_NE), 8).scatter(1, their_chosen, their_weights)
    )


# -- Sinkhorn ---------------------------------------------------------------------------


def megatron_sinkhorn(cost: Tensor, tolerance: float = 1e-6) -> Tensor:
    """The published iteration: rows and columns in turn until nothing changes."""
    cost = cost.double().exp()
    rows, columns = torch.ones(len(cost)).double(), torch.ones(cost.shape[1]).double()
    error = 1.0
    while error > tolerance:
        before = columns
        rows = 1 / len(rows) / (columns * cost).sum(1)
        columns = 1 / len(columns) / (rows[:, None] * cost).sum(0)
        error = (before - columns).abs().mean().item() / columns.mean().item()
    return columns * cost * rows[:, None]


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_sinkhorn_chooses_as_the_iteration_to_the_end(function: str) -> None:
    """Its potentials are those of logits, whatever makes weights of them."""
    x_NX = logits(spread=1.5)
    shift_BX = sinkhorn(x_NX[None])
    plan = (x_NX + shift_BX[0]).softmax(-1)
    torch.testing.assert_close(plan.sum(0), torch.full((8,), 50 / 8), rtol=2e-3, atol=0)
    exact = megatron_sinkhorn(x_NX)
    kind = {"moe_router_load_balancing_type": "sinkhorn", "moe_router_score_function": function}
    _, chosen = choose(x_NX, routing(**kind), shift_BX)
    same = (exact.topk(2).indices == chosen).all(-1).float().mean()
    assert same >= 0.98


def test_sinkhorn_balances_what_all_tokens_prefer() -> None:
    x_BSX = torch.randn(2, 400, 8, generator=torch.Generator().manual_seed(1))
    x_BSX[..., 0] += 5.0
    # Preferred by none: a matter of logarithms.
    x_BSX[..., 7] -= 200.0
    shift = sinkhorn(x_BSX)
    assert torch.isfinite(shift).all()
    for sequence, own in zip(x_BSX, shift, strict=True):
        counts = (sequence + own).argmax(-1).bincount(minlength=8)
        assert counts.max() <= 1.6 * 50 and counts.min() >= 0.4 * 50


def test_sinkhorn_is_of_each_sequence_and_of_training() -> None:
    made = layer(moe_router_load_balancing_type="sinkhorn", moe_router_topk=1)
    torch.testing.assert_close(made(states()), by_loop(made, states()))
    made.train()
    whole = made(states())
    assert not torch.allclose(whole, by_loop(made, states()))
    for row in range(3):
        torch.testing.assert_close(made(states()[row : row + 1]), whole[row : row + 1])
    assert made.balance.coefficients[0] == 0.0


# -- biases of experts ------------------------------------------------------------------


def test_biases_move_by_the_sign_of_what_is_missing() -> None:
    chosen = torch.tensor([[10, 30, 20, 20], [1, 0, 0, 0]], dtype=torch.float64)
    bias = [torch.zeros(4), torch.zeros(4)]
    move_biases(dict(enumerate(bias)), chosen, 0.25)
    assert bias[0].tolist() == [0.25, -0.25, 0.0, 0.0]
    assert bias[1].tolist() == [-0.25, 0.25, 0.25, 0.25]
    assert max_violation(chosen).item() == pytest.approx((0.5 + 3.0) / 2)
    # No rounding where floats would have some: thirds of counts beyond 2^24.
    many = torch.tensor([[2**25 + 1, 2**25 + 1, 2**25 + 1]], dtype=torch.float64)
    third = [torch.zeros(3)]
    move_biases(dict(enumerate(third)), many, 1.0)
    assert not third[0].any()
    assert max_violation(torch.zeros(1, 4).double()).item() == -1.0


@pytest.mark.parametrize("recompute", [False, True])
def test_tokens_are_counted_once(recompute: bool) -> None:
    made = layer(**DEEPSEEK, moe_expert_capacity_factor=0.5).train()
    made.balance.begin(CPU, samples=6, tokens=144, loss_scale=1.0)
    for _ in range(2):
        x = states().requires_grad_()
        out = checkpoint(made, x, use_reentrant=False) if recompute else made(x)
        out.sum().backward()
    counts = made.balance.chosen(CPU)
    _, chosen = choose(made.router(states().flatten(0, 1)), made.routing, made.router.expert_bias)
    # Two micro-batches; what a capacity drops was chosen too; the other layer did not run.
    assert torch.equal(counts[0], 2 * chosen.flatten().bincount(minlength=8))
    assert not counts[1].any()
    made.balance.begin(CPU, samples=6, tokens=144, loss_scale=1.0)
    assert not made.balance.chosen(CPU).any()


def test_biases_are_kept_and_stay_exact() -> None:
    model = small_model(config(**DEEPSEEK))
    names = [f"layers.{i}.mlp.router.expert_bias" for i in range(2)]
    assert sorted(kept_buffers(model)) == names
    assert set(kept_tensors(model)) == {*dict(model.named_parameters()), *names}
    bias = layer_of(model).router.expert_bias
    assert bias is not None
    bias.fill_(0.1)
    for cast in (model.bfloat16(), model.half(), model.float()):
        kept = layer_of(cast).router.expert_bias
        assert kept is not None and torch.equal(kept, torch.full((8,), 0.1))
    meta = layer_of(model.to("meta")).router.expert_bias
    assert meta is not None and meta.is_meta
    assert kept_buffers(small_model(config())) == {}


# -- shared experts ---------------------------------------------------------------------


@pytest.mark.parametrize("gate", [True, False])
def test_shared_expert(gate: bool) -> None:
    made = layer(moe_shared_expert_intermediate_size=20, moe_shared_expert_gate=gate)
    shared = made.shared
    assert shared is not None

    def explicit(x: Tensor) -> Tensor:
        silu = torch.nn.functional.silu(x @ shared.gate.weight.T)  # type: ignore[union-attr]
        out = (silu * (x @ shared.up.weight.T)) @ shared.down.weight.T
        if shared.token_gate is not None:
            out = out / (1 + (-x @ shared.token_gate.weight.T).exp())
        return by_loop(made, x) + out

    ours, theirs = gradients(made, states(), made), gradients(made, states(), explicit)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)


def test_initial_values_of_a_shared_expert() -> None:
    wide = {"moe_shared_expert_intermediate_size": 640, "moe_shared_expert_gate": True}
    made = small_model(config(**wide))
    parameters = dict(made.named_parameters())
    prefix = "layers.1.mlp.shared"
    assert parameters[f"{prefix}.up.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    down = parameters[f"{prefix}.down.weight"]
    assert down.std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.05)
    assert torch.equal(down, initial_value(f"{prefix}.down.weight", (32, 640), made.config, 1))
    assert parameters[f"{prefix}.token_gate.weight"].shape == (1, 32)


# Dynamo's own doing.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "changes",
    [
        {**DEEPSEEK, "moe_router_num_groups": 4, "moe_router_group_topk": 2},
        {"moe_router_load_balancing_type": "sinkhorn"},
    ],
    ids=["deepseek", "sinkhorn"],
)
def test_compiled_blocks(changes: dict[str, Any]) -> None:
    """One graph in bf16, whatever the router: the host waits for nothing."""
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = small_model(config(**changes)).bfloat16().train()
        assert model.balance is not None
        for block in model.layers.values():
            if compiled:
                block.compile(backend="aot_eager", dynamic=False, fullgraph=True)
        model.balance.begin(CPU, samples=2, tokens=48, loss_scale=1.0)
        with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=2):
            model(torch.arange(48).view(2, 24)).square().mean().backward()
        found.append((model.balance.means(), model.balance.chosen(CPU)))
    torch._dynamo.reset()
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][1].sum() == 2 * 48 * model.config.moe_router_topk
