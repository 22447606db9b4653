"""Norms: LayerNorm (Ba et al. 2016) and RMSNorm (Zhang & Sennrich 2019), either with weights
around one or around zero (Gemma; Megatron-LM's layernorm-1p)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtk.config.model import ModelConfig


def make_norm(config: ModelConfig, size: int | None = None) -> nn.Module:
    """The model's kind of norm over the last ``size`` channels (default: the hidden size)."""
    size = config.hidden_size if size is None else size
    layer_norm, eps = config.normalization == "LayerNorm", config.norm_epsilon
    if config.apply_layernorm_1p:
        return ZeroCentredNorm(size, eps, centre=layer_norm)
    return nn.LayerNorm(size, eps=eps) if layer_norm else nn.RMSNorm(size, eps=eps)


class ZeroCentredNorm(nn.Module):
    """norm(x) * (1 + weight), computed in fp32: 1 + weight would lose bits in bf16.

    centre: subtract the mean and add a bias (LayerNorm), else RMSNorm.
    """

    def __init__(self, size: int, eps: float, *, centre: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))
        self.bias = nn.Parameter(torch.zeros(size)) if centre else None

    def forward(self, x: Tensor) -> Tensor:
        scale, shape = 1.0 + self.weight.float(), self.weight.shape
        if self.bias is None:
            return F.rms_norm(x.float(), shape, scale, self.eps).type_as(x)
        return F.layer_norm(x.float(), shape, scale, self.bias.float(), self.eps).type_as(x)
