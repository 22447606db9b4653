"""What a step of decoding must read at least, by the model alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from mtk.config.mamba import mamba_sizes
from mtk.models.gpt import GPT


def read_weights(model: GPT) -> int:
    """Bytes of all parameters but an embedding that is only looked up and what only prompts go
    through."""
    looked_up = 0
    if model.output is not None and model.embedding is not None:
        looked_up = model.embedding.tokens.weight.nbytes
    named = model.named_parameters()
    return sum(p.nbytes for name, p in named if not prompts_only(model, name)) - looked_up


def prompts_only(model: GPT, parameter: str) -> bool:
    """Whether a parameter works on prompts alone: the encoder of a T5, and the matrices that make
    keys and values of its states, which are kept."""
    if model.config.family != "t5":
        return False
    first, _, rest = parameter.partition(".")
    if first == "layers":
        number, _, part = rest.partition(".")
        kept = part.startswith(("cross_attention.key", "cross_attention.value"))
        return int(number) < model.config.num_layers or kept
    return first in ("encoder_norm", "encoder_bias")


def cache_token_bytes(model: GPT) -> int:
    """Bytes of the keys and values of one token: of a T5 of the decoder's layers, which look at
    each of their own tokens and each of the prompt's once."""
    layers = sum(getattr(block, "attention", None) is not None for block in _decoding(model))
    config = model.config
    each = 2 * config.query_groups * config.head_size * model.output_weight.element_size()
    return layers * each


def state_bytes(model: GPT) -> int:
    """Bytes of the states of one sequence in the Mamba layers: the inputs that convolutions still
    look at, and the states in fp32."""
    if not model.stateful_layers:
        return 0
    sizes = mamba_sizes(model.config)
    inputs = (sizes.conv - 1) * (sizes.width + 2 * sizes.shared)
    states = sizes.heads * sizes.head * sizes.state * torch.float32.itemsize
    return len(model.stateful_layers) * (inputs * model.output_weight.element_size() + states)


def _decoding(model: GPT) -> Iterator[nn.Module]:
    for name, block in model.layers.items():
        if model.config.family != "t5" or int(name) >= model.config.num_layers:
            yield block
