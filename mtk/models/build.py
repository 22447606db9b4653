"""From a model configuration to a module; the one place that knows the families."""

from __future__ import annotations

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
