"""MoE layers against a loop over experts, transformers' Mixtral and written-out losses.

Shape suffixes: as in ``mtk.models.moe``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mtk.config.model import ModelConfig
from mtk.models.experts import reference_experts
from mtk.models.gpt import GPT
from mtk.models.init import initial_value
from mtk.models.moe import MoE
from mtk.models.router import choose
from tests.models.sizes import llama_config, small_model

CPU = torch.device("cpu")


def config(**changes: Any) -> ModelConfig:
    return llama_config(**{"num_experts": 8, "moe_ffn_hidden_size": 24, **changes})


def layer_of(model: GPT, index: int = 0) -> MoE:
    layer = model.layers[str(index)].mlp
    assert isinstance(layer, MoE)
    return layer


def layer(seed: int = 1, **changes: Any) -> MoE:
    """A layer whose router is decided: its logits are spread."""
    made = layer_of(small_model(config(**changes), seed))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.mul_(20 if name.startswith("router") else 5)
    return made


def states(batch: int = 3, length: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, length, 32, generator=generator)


def by_loop(made: MoE, x_BSE: Tensor, kept: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    x_TE = x_BSE.flatten(0, 1)
    weights_TK, chosen_TK = choose(made.router(x_TE), made.routing, made.router.expert_bias)
    if kept is not None:
        weights_TK = weights_TK * kept(chosen_TK)
    return reference_experts(made.experts, x_TE, weights_TK, chosen_TK).view_as(x_BSE)


def gradients(made: MoE, x_BSE: Tensor, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    made.zero_grad()
    x_BSE = x_BSE.clone().requires_grad_()
    out = run(x_BSE)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    found = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    assert x_BSE.grad is not None
    return {"x": x_BSE.grad, "out": out.detach(), **found}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name in ours:
        scale = theirs[name].abs().max().item()
        assert scale > 0, name
        assert (ours[name] - theirs[name]).abs().max().item() <= 1e-6 * scale, name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_router_topk": 1},
        {"moe_router_topk": 8},
        {"activation": "gelu"},
        {"num_experts": 3},
    ],
    ids=str,
)
def test_equals_the_loop(changes: dict[str, Any]) -> None:
    made = layer(**changes)
    ours = gradients(made, states(), made)
    assert_same(ours, gradients(made, states(), lambda x: by_loop(made, x)))


def test_one_expert_for_all_and_none_for_the_others() -> None:
    made = layer(moe_router_topk=1)
    with torch.no_grad():
        made.router.weight.zero_()
        made.router.weight[3, 0] = 1.0
    x_BSE = states()
    x_BSE[..., 0] = 2.0
    ours = gradients(made, x_BSE, made)
    assert_same(
        {n: g for n, g in ours.items() if n != "x"},
        {n: g for n, g in gradients(made, x_BSE, lambda x: by_loop(made, x)).items() if n != "x"},
    )
    up = ours["experts.up"]
    assert up[3].any() and not up[[0, 1, 2, 4, 5, 6, 7]].any()


def test_any_number_of_tokens() -> None:
    made = layer()
    x_BSE = states(1, 1)
    torch.testing.assert_close(made(x_BSE), by_loop(made, x_BSE))
    assert made(x_BSE[:, :0]).shape == (1, 0, 32)
    # What neither batch nor order should change.
    whole = made(states())
    torch.testing.assert_close(made(states()[:, 5:9]), whole[:, 5:9])


def test_the_gradient_may_be_expanded() -> None:
    made = layer()
    made(states()).sum().backward()
    assert made.experts.down.grad is not None


def test_equals_transformers_mixtral() -> None:
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    made = layer()
    block = mixtral.MixtralSparseMoeBlock(
        mixtral.MixtralConfig(
            hidden_size=32, intermediate_size=24, num_local_experts=8, num_experts_per_tok=2
        )
    ).eval()
    experts = made.experts
    assert experts.gate is not None
    with torch.no_grad():
        block.gate.weight.copy_(made.router.weight)
        block.experts.gate_up_proj.copy_(torch.cat((experts.gate, experts.up), dim=1))
        block.experts.down_proj.copy_(experts.down)
    torch.testing.assert_close(made(states()), block(states()), rtol=1e-5, atol=1e-6)


# -- balance ----------------------------------------------------------------------------


def written_out(made: MoE, x_BSE: Tensor) -> tuple[Tensor, Tensor]:
    """Aux loss summed over sequences and z-loss over tokens, by their formulas."""
    length = x_BSE.shape[1]
    aux, z = torch.zeros(()), torch.zeros(())
    for sequence in x_BSE:
        logits = sequence @ made.router.weight.T
        _, chosen = choose(logits, made.routing)
        n_X = torch.stack([(chosen == e).sum() for e in range(made.num_experts)])
        p_X = logits.softmax(-1).sum(0)
        aux = aux + made.num_experts / (made.k * length**2) * (n_X * p_X).sum()
        z = z + logits.exp().sum(-1).log().square().sum()
    return aux, z


def test_losses_enter_the_gradient_once() -> None:
    coefficients = {"moe_aux_loss_coeff": 0.3, "moe_z_loss_coeff": 0.02}
    made = layer(**coefficients)
    x_BSE = states()
    made.train()
    made.balance.begin(CPU, samples=6, tokens=6 * 24, loss_scale=8.0)
    ours = gradients(made, x_BSE, made)
    means = made.balance.means()

    def explicit(x: Tensor) -> Tensor:
        aux, z = written_out(made, x)
        loss = 8.0 * (0.3 * aux / 6 + 0.02 * z / (6 * 24))
        out = by_loop(made, x)
        # So that the common test loss has these as further terms.
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        return out + loss / (weight * weight).sum() * weight

    theirs = gradients(made, x_BSE, explicit)
    del ours["out"], theirs["out"]
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-5, atol=1e-5)
    aux, z = written_out(made, x_BSE)
    # Two layers share the record, one of them ran.
    torch.testing.assert_close(means, torch.stack((aux / 6, z / (6 * 24))) / 2)


def test_values_are_counted_once_under_recomputation() -> None:
    found = []
    for recompute in (False, True):
        made = layer(moe_aux_loss_coeff=0.5).train()
        made.balance.begin(CPU, samples=3, tokens=72, loss_scale=1.0)
        run = (lambda x, m=made: checkpoint(m, x, use_reentrant=False)) if recompute else made
        found.append((gradients(made, states(), run), made.balance.means()))
    assert torch.equal(found[0][1], found[1][1]) and found[0][1].all()
    assert all(torch.equal(found[0][0][n], found[1][0][n]) for n in found[0][0])


def test_extremes_of_the_aux_loss() -> None:
    made = layer().train()
    for scale, expected in ((0.0, 1.0), (1e4, 8 / 2)):
        made.balance.begin(CPU, samples=2, tokens=48, loss_scale=1.0)
        with torch.no_grad():
            made.router.weight.zero_()
            made.router.weight[:2, 0] = scale
        x_BSE = states(2)
        x_BSE[..., 0] = 1.0
        made(x_BSE.requires_grad_()).sum().backward()
        assert 2 * made.balance.means()[0].item() == pytest.approx(expected)


def test_no_losses_outside_training() -> None:
    made = layer()
    made.balance.begin(CPU, samples=3, tokens=72, loss_scale=1.0)
    made(states()).sum().backward()
    assert not made.balance.means().any()
    made.train()
    with torch.no_grad():
        made(states())
    assert not made.balance.means().any()


# -- capacity ---------------------------------------------------------------------------


def first_come(length: int, capacity: int) -> Callable[[Tensor], Tensor]:
    """1 where an assignment is among its expert's first of the sequence, by a plain loop."""

    def kept(chosen_TK: Tensor) -> Tensor:
        keep = torch.ones(chosen_TK.shape)
        for start in range(0, len(chosen_TK), length):
            taken: dict[int, int] = {}
            for token in range(start, start + length):
                for slot, expert in enumerate(chosen_TK[token].tolist()):
                    taken[expert] = taken.get(expert, 0) + 1
                    keep[token, slot] = float(taken[expert] <= capacity)
        return keep

    return kept


@pytest.mark.parametrize("factor", [0.25, 1.0, 1.3, 8.0])
def test_capacity_keeps_the_first(factor: float) -> None:
    made = layer(moe_expert_capacity_factor=factor).train()
    capacity = math.ceil(factor * 2 * 24 / 8)
    kept = first_come(24, capacity)
    dropped = int((kept(choose(made.router(states().flatten(0, 1)), made.routing)[1]) == 0).sum())
    assert (dropped > 0) == (factor < 8)
    ours = gradients(made, states(), made)
    assert_same(ours, gradients(made, states(), lambda x: by_loop(made, x, kept)))


def test_capacity_is_of_training_alone_and_of_each_sequence() -> None:
    made = layer(moe_expert_capacity_factor=0.5)
    torch.testing.assert_close(made(states()), by_loop(made, states()))
    made.train()
    whole = made(states())
    assert not torch.allclose(whole, by_loop(made, states()))
    for row in range(3):
        torch.testing.assert_close(made(states()[row : row + 1]), whole[row : row + 1])


# -- model ------------------------------------------------------------------------------


def test_names_and_initial_values() -> None:
    made = small_model(config(moe_layer_freq=2))
    parameters = dict(made.named_parameters())
    prefix = "layers.0.mlp"
    assert parameters[f"{prefix}.router.weight"].shape == (8, 32)
    assert parameters[f"{prefix}.experts.gate"].shape == (8, 24, 32)
    assert parameters[f"{prefix}.experts.down"].shape == (8, 32, 24)
    assert "layers.1.mlp.up.weight" in parameters
    assert parameters[f"{prefix}.experts.up"].std().item() == pytest.approx(0.02, rel=0.05)
    assert parameters[f"{prefix}.experts.down"].std().item() == pytest.approx(0.01, rel=0.05)
    assert parameters[f"{prefix}.router.weight"].std().item() == pytest.approx(0.02, rel=0.2)
    again = initial_value(f"{prefix}.experts.up", (8, 24, 32), made.config, 1)
    assert torch.equal(parameters[f"{prefix}.experts.up"], again)


def test_a_stage_or_copy_keeps_one_record() -> None:
    from copy import deepcopy

    copied = deepcopy(small_model(config()))
    assert layer_of(copied).balance is layer_of(copied, 1).balance is copied.balance
    assert small_model(llama_config()).balance is None


# Dynamo's own doing.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_blocks(backend: str, dtype: torch.dtype) -> None:
    """In bf16 each block is one graph: nothing waits for the host."""
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = small_model(config(moe_expert_capacity_factor=1.0)).to(dtype).train()
        assert model.balance is not None
        for block in model.layers.values():
            if compiled:
                block.compile(backend=backend, dynamic=False, fullgraph=dtype == torch.bfloat16)
        model.balance.begin(CPU, samples=2, tokens=48, loss_scale=1.0)
        tokens = torch.arange(48).view(2, 24)
        model(tokens).square().mean().backward()
        found.append((model.balance.means(), {n: p.grad for n, p in model.named_parameters()}))
    torch._dynamo.reset()
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-5, atol=1e-7)
