"""From a model configuration to a module; the one place that knows the families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mtk.config.model import ModelConfig
from mtk.errors import ConfigError
from mtk.models.attention import AttentionKernel, sdpa_kernel
from mtk.models.bert import Bert
from mtk.models.gpt import GPT
from mtk.models.lora import add_adapters
from mtk.models.t5 import T5

MODULES: Mapping[str, type[GPT]] = {"gpt": GPT, "bert": Bert, "t5": T5}


def build_model(config: ModelConfig, kernel: AttentionKernel = sdpa_kernel) -> GPT:
    """The module without meaningful weights; of one with adapters all else is frozen."""
    model = MODULES[config.family](config, kernel)
    if config.lora.lora_rank is not None:
        add_adapters(model, config)
    return model


def build_on_meta(config: ModelConfig, kernel: AttentionKernel = sdpa_kernel) -> GPT:
    """As :func:`build_model` on the meta device, without torch's own initial weights: these
    mean nothing there, cost most of the time and make torch load its compiler. Also raises
    ConfigError for weights that no machine could address."""
    try:
        with torch.device("meta"), _NoInitialWeights():
            return build_model(config, kernel)
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise ConfigError(
            "a weight of these sizes has more elements than torch can count. Lower "
            "--hidden-size, --ffn-hidden-size or --vocab-size."
        ) from error


class _NoInitialWeights(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
