"""The formulas that several families use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mtk.errors import ConversionError

Weights = Mapping[str, Tensor]


def attend(
    q_BSD: Tensor,
    k_BSD: Tensor,
    v_BSD: Tensor,
    *,
    window: int | None = None,
    slope: float = 0.0,
) -> Tensor:
    """One head. window: tokens that a token sees, itself the last of them. slope: what a score
    loses for each token of distance."""
    size = q_BSD.shape[1]
    scores_BST = q_BSD @ k_BSD.transpose(1, 2) / math.sqrt(q_BSD.shape[-1])
    place = torch.arange(size, device=q_BSD.device)
    behind_ST = place[:, None] - place[None, :]
    scores_BST = scores_BST - slope * behind_ST
    hidden_ST = (behind_ST < 0) | (behind_ST >= (size if window is None else window))
    return torch.softmax(scores_BST.masked_fill(hidden_ST, -math.inf), dim=-1) @ v_BSD


def layer_norm(x: Tensor, w: Weights, name: str, epsilon: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.pow(2).mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(variance + epsilon) * w[f"{name}.weight"] + w[f"{name}.bias"]


def affine(x: Tensor, w: Weights, name: str, *, bias: bool) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if bias else y


def tied(config: Mapping[str, Any], default: bool) -> bool:
    value = config.get("tie_word_embeddings")
    return default if value is None else bool(value)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """By transformers' name. Raises ConversionError for one not known."""
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu_new": tanh_gelu,
        "gelu_pytorch_tanh": tanh_gelu,
        "gelu_fast": tanh_gelu,
        "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        "silu": lambda x: x * torch.sigmoid(x),
        "swish": lambda x: x * torch.sigmoid(x),
        "relu": torch.relu,
        "relu2": lambda x: torch.relu(x).pow(2),
    }
    if name not in kinds:
        raise ConversionError(f"no reference for activation {name!r}")
    return kinds[name]


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
