"""Feed-forward part of a block: plain, or gated as in SwiGLU and GEGLU (Shazeer 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtk.config.model import ModelConfig


def _gelu_tanh(x: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # The same function; what the compiler makes of a sigmoid is faster than of a tanh.
    wide = x.float()
    turn = 2.0 * math.sqrt(2.0 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return (wide * torch.sigmoid(turn)).to(x.dtype)


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu-tanh": _gelu_tanh,
    "relu": F.relu,
    "squared-relu": _squared_relu,  # So et al. 2021
    # Gated; the other factor is linear.
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu-tanh": _gelu_tanh,
}


class MLP(nn.Module):
    """down(act(up(x))), or gated down(act(gate(x)) * up(x)). [..., E] -> [..., E]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, ffn, bias = config.hidden_size, config.ffn_size, config.mlp_bias
        self.activation = ACTIVATIONS[config.activation]
        self.gate = nn.Linear(hidden, ffn, bias=bias) if config.gated else None
        self.up = nn.Linear(hidden, ffn, bias=bias)
        self.down = nn.Linear(ffn, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))  # type: ignore[no-any-return]
        return self.down(self.activation(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]
