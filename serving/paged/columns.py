"""How matrices lie in a host's memory while they are multiplied with few rows.

A step of decoding reads every matrix once for a handful of rows. With more outputs than inputs a
host's library does that in half to nine tenths of the time where the outputs of one input lie
together (columns of the weight, which is [outputs, inputs]) instead of the inputs of one output;
with fewer outputs it is the other way round (docs/benchmarks/serving.md). Values, shapes and names
stay; products of many rows take the same time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def wants_columns(weight: Tensor) -> bool:
    """Whether a matrix [outputs, inputs] is better read column by column: wide ones in fp32 on a
    host. Other precisions are packed anew by their library at each product."""
    outputs, inputs = weight.shape
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and outputs > inputs


def in_columns(weight: Tensor) -> Tensor:
    """The same matrix, its columns one after the other."""
    return weight.T.contiguous().T


def lay_out(module: nn.Module | None) -> None:
    """Let a plain linear layer's matrix lie as it is read best."""
    if type(module) is nn.Linear and wants_columns(module.weight):
        module.weight.data = in_columns(module.weight.detach())
