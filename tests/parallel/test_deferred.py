"""Delayed weight gradients are the plain ones, later."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtk.models.build import build_model
from mtk.parallel.deferred import InjectedLinear, defer_weight_gradients
from tests.parallel.pipelines import TINY, make_batches


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_come_later_and_are_the_same(recompute: bool) -> None:
    plain = build_model(TINY)
    late = copy.deepcopy(plain)
    names = [name for name, _ in late.named_parameters()]
    deferred = defer_weight_gradients(late)
    assert [name for name, _ in late.named_parameters()] == names
    for micro, batch in enumerate(make_batches(2)):
        plain(batch.tokens_BS).square().sum().backward()
        out = (
            checkpoint(late, batch.tokens_BS, use_reentrant=False)
            if recompute
            else late(batch.tokens_BS)
        )
        deferred.micro = micro
        out.square().sum().backward()
        deferred.micro = None
    found = gradients(late)
    assert found["layers.0.mlp.up.weight"] is None
    assert found["layers.0.mlp.up.bias"] is None
    assert found["layers.0.mlp_norm.weight"] is not None
    deferred.finish(1)
    for micro in deferred.waiting:
        deferred.finish(micro)
    deferred.finish(0)  # done already: nothing happens
    torch.testing.assert_close(gradients(late), gradients(plain), rtol=1e-5, atol=1e-5)


def test_without_delay_it_is_a_linear_layer() -> None:
    plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    other = copy.deepcopy(plain)
    defer_weight_gradients(other)
    assert all(type(layer) is InjectedLinear for layer in other)
    x = torch.randn(2, 5, 3, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    plain(x).square().sum().backward()
    other(y).square().sum().backward()
    torch.testing.assert_close(gradients(other), gradients(plain))
    torch.testing.assert_close(y.grad, x.grad)


def test_what_cannot_be_delayed_is_not() -> None:
    layer = nn.Sequential(nn.Linear(3, 4))
    deferred = defer_weight_gradients(layer)
    weight = nn.Parameter(torch.randn(4, 3))
    deferred.micro = 0
    deferred.product(torch.randn(2, 3), weight * 2).sum().backward()
    assert weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 3)).sum().backward()
    assert layer[0].weight.grad is not None
    layer[0].weight.requires_grad_(False)
    layer(torch.randn(2, 3, requires_grad=True)).sum().backward()
    for micro in deferred.waiting:
        deferred.finish(micro)


def test_hooks_stay_on_a_replaced_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0,))
    defer_weight_gradients(model)
    bias = model[0].bias
    assert torch.equal(model(torch.ones(1, 3))[0], bias)
