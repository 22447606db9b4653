"""Which layers of a model compute in FP8, and how these call it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mtk.config.float8 import STEP, Float8Options
from mtk.config.model import ModelConfig
from mtk.errors import ConfigError, LayoutError, Problem
from mtk.models.attention import Attention
from mtk.models.gpt import GPT
from mtk.models.mlp import MLP
from mtk.parallel.deferred import injected
from mtk.precision.float8 import Scaling, linear, mlp
from mtk.precision.float8_casts import ACTIVATIONS, Casts, casts_on

# Gradients among the tensors that are cast; see the functions of mtk.precision.float8.
LINEAR = (False, False, True)
PERCEPTRON = (False, False, False, False, True, True)


def use_float8(model: GPT, options: Float8Options, device: torch.device) -> None:
    """Let the large linear layers of ``model``, or of a stage of one, compute in FP8.

    To be called when layers are cut over ranks and before blocks are compiled or wrapped;
    parameters and hooks stay what they are. Which layers it is depends on the model alone, not
    on the layout. Raises ConfigError where none is large enough, LayoutError where a rank's part
    of one is not a multiple of 16.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        rule = f"needs a GPU of compute capability 8.9 or more; {device} has less"
        raise LayoutError([Problem("precision.fp8_format", options.fp8_format, rule)])
    config, casts = model.config, casts_on(device)
    attention, perceptron = _large(config, options)
    if not (attention or perceptron):
        rule = f"no linear layer has {options.fp8_min_size} or more inputs and outputs"
        fix = "Lower --fp8-min-size, or leave out --fp8."
        raise ConfigError([Problem("precision.fp8_format", options.fp8_format, rule, fix)])
    last = config.num_layers - options.num_layers_at_end_in_bf16
    for number, block in model.layers.items():
        if not options.num_layers_at_start_in_bf16 <= int(number) < last:
            continue
        if attention and type(block.attention) is Attention:
            _attention(block.attention, options, casts)
        if perceptron and type(block.mlp) is MLP:
            _mlp(block.mlp, config.activation, options, casts)


def _large(config: ModelConfig, options: Float8Options) -> tuple[bool, bool]:
    """Whether the matrices of attention, and of MLPs, are large enough."""
    heads = min(config.num_attention_heads, config.query_groups) * config.head_size
    least = options.fp8_min_size
    return (
        min(config.hidden_size, heads) >= least,
        min(config.hidden_size, config.ffn_size) >= least and config.activation in ACTIVATIONS,
    )


def _attention(attention: Attention, options: Float8Options, casts: Casts) -> None:
    _check(attention.query, attention.key, attention.value, attention.output)
    attention.__class__ = Float8Attention
    attention.float8 = Scaling(options, casts, LINEAR)
    attention.output = _injected(attention.output, Scaling(options, casts, LINEAR))


def _mlp(module: MLP, activation: str, options: Float8Options, casts: Casts) -> None:
    _check(module.gate, module.up, module.down)
    module.__class__ = Float8MLP
    module.kind = activation  # type: ignore[assignment]
    module.float8 = Scaling(options, casts, PERCEPTRON)
    module.down = _injected(module.down, None)


def _check(*layers: nn.Linear | None) -> None:
    for layer in layers:
        sizes = [] if layer is None else list(layer.weight.shape)
        if any(size % STEP for size in sizes):
            rule = f"needs matrices in steps of {STEP}; a rank has one of {sizes}"
            fix = "Change the sizes or --tp, or leave out --fp8."
            raise LayoutError([Problem("precision.fp8_format", sizes, rule, fix)])


def _injected(layer: nn.Linear, scaling: Scaling | None) -> Any:
    """The layer with its matrix product replaced: by one in FP8, or (None) by nothing, where it
    is given what the product would have been."""
    product = _given if scaling is None else Float8Product(scaling)
    # A layer that is cut over ranks has a product already; it sums and adds the bias itself.
    found = layer if hasattr(layer, "product") else injected(layer)
    setattr(found, "product", product)  # noqa: B010
    return found


def _given(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    del weight
    return x if bias is None else x + bias


class Float8Product(nn.Module):
    """As ``F.linear``; the bias is added to the rounded product."""

    def __init__(self, scaling: Scaling) -> None:
        super().__init__()
        self.scaling = scaling

    def forward(self, x: Tensor, weight_FE: Tensor, bias: Tensor | None = None) -> Tensor:
        out = linear(x, weight_FE, None, self.scaling)
        return out if bias is None else out + bias


class Float8Attention(Attention):
    """Query, key and value as one product in FP8."""

    float8: Scaling

    def project(self, x_BSE: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = (self.query, self.key, self.value)
        weight = torch.cat([part.weight for part in parts])
        bias = None if self.query.bias is None else torch.cat([part.bias for part in parts])
        del source  # the same tensor
        out = linear(x_BSE, weight, bias, self.float8)
        query, key, value = torch.split(out, [part.weight.shape[0] for part in parts], dim=-1)
        return query, key, value


class Float8MLP(MLP):
    """All of an MLP's products in FP8; what comes out of the last is ``down``'s to finish."""

    float8: Scaling
    kind: str

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.up.weight
        bias: Tensor | None = self.up.bias
        if self.gate is not None:
            weight = torch.cat((self.gate.weight, weight))
            bias = None if bias is None else torch.cat((self.gate.bias, bias))
        out = mlp(x, weight, bias, self.down.weight, self.kind, self.float8)
        return self.down(out)  # type: ignore[no-any-return]
