"""Low-rank adapters (Hu et al. 2021): W x + alpha / rank B A x beside frozen weights W.

Shape suffixes: R rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from mtk.config.lora import LoraConfig
from mtk.config.model import ModelConfig
from mtk.models.attention import Attention
from mtk.models.gpt import Product
from mtk.models.mlp import MLP
from mtk.models.moe import MoE

# Names of an adapter's matrices: {layer}.lora.a, {layer}.lora.b.
ADAPTER = re.compile(r"(.+)\.lora\.[ab]")
LINEARS: Mapping[type[nn.Module], tuple[str, ...]] = {
    Attention: ("query", "key", "value", "output"),
    MLP: ("gate", "up", "down"),
}


class LowRank(nn.Module):
    """scale B A x. a: [R, inputs], normal; b: [outputs, R], zero, so that nothing changes at
    first."""

    def __init__(self, linear: nn.Linear, config: LoraConfig) -> None:
        super().__init__()
        assert config.lora_rank is not None
        rank, weight = config.lora_rank, linear.weight
        self.a = nn.Parameter(weight.new_empty(rank, linear.in_features))
        self.b = nn.Parameter(weight.new_zeros(linear.out_features, rank))
        self.scale, self.p = config.scale, config.lora_dropout
        self.dropout: nn.Module = nn.Dropout(self.p)
        self.product: Product = F.linear

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.product(self.dropout(x), self.a)
        out: Tensor = self.product(inner, self.b)
        return out * self.scale


class LoraLinear(nn.Linear):
    """A linear layer with an adapter beside it."""

    def __init__(self, linear: nn.Linear, config: LoraConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora = LowRank(linear, config)
        self.product: Product = F.linear

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.product(x, self.weight, self.bias) + self.lora(x)
        return out


def add_adapters(model: nn.Module, config: ModelConfig) -> None:
    """Give the chosen linear layers of ``model`` adapters and freeze all else, but for the head
    of a task."""
    for part in _parts(model, config.lora):
        for name in LINEARS[type(part)]:
            linear = getattr(part, name)
            if linear is not None:
                setattr(part, name, LoraLinear(linear, config.lora))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) or config.in_head(name))


def _parts(model: nn.Module, config: LoraConfig) -> Iterator[nn.Module]:
    """Modules whose linear layers get adapters; experts are none of them."""
    inside = {part for moe in model.modules() if isinstance(moe, MoE) for part in moe.modules()}
    for module in list(model.modules()):
        attention = isinstance(module, Attention) and config.has("attention")
        if attention or (type(module) is MLP and module not in inside and config.has("mlp")):
            yield module


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ADAPTER.fullmatch(name) is not None


def adapted_weight(name: str) -> str:
    """Name of the frozen weight that an adapter's parameter stands beside."""
    found = ADAPTER.fullmatch(name)
    assert found is not None
    return f"{found[1]}.weight"


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale B A in fp32."""
    return weight.float() + scale * (b.float() @ a.float())
