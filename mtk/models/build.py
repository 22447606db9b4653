"""From a model configuration to a module; the one place that knows the families."""

from __future__ import annotations

from dataclasses import replace

import torch

from mtk.config.model import ModelConfig
from mtk.errors import ConfigError, Problem
from mtk.models.attention import AttentionKernel, sdpa_kernel
from mtk.models.gpt import GPT


def build_model(config: ModelConfig, kernel: AttentionKernel = sdpa_kernel) -> GPT:
    """The module without meaningful weights. Raises ConfigError for a family not built yet."""
    if config.family != "gpt":
        rule = "this version trains and serves family gpt; others can be planned only"
        raise ConfigError([Problem("model.family", config.family, rule, "Nearest: gpt.")])
    return GPT(config, kernel)


def restore_buffers(model: GPT, config: ModelConfig, device: torch.device | str) -> None:
    """Recompute non-persistent buffers (rotary tables), which stay fp32 in any dtype."""
    fresh = dict(build_model(small_like(config)).named_buffers())
    for name, buffer in fresh.items():
        model.register_buffer(name, buffer.to(device), persistent=False)


def small_like(config: ModelConfig) -> ModelConfig:
    """The same model without its large weights: buffers depend on the remaining sizes."""
    return replace(config, num_layers=0, vocab_size=1, make_vocab_size_divisible_by=1)
