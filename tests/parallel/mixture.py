"""A model with experts, whether or not this version's options know them."""

from __future__ import annotations

from dataclasses import fields, make_dataclass
from typing import Any

from mtk.config.model import ModelConfig


def with_experts(model: ModelConfig, experts: int, width: int) -> ModelConfig:
    """``model`` with ``experts`` experts of ``width`` in each layer, two for each token."""
    known = {field.name for field in fields(ModelConfig)}
    extra = {"num_experts": experts, "moe_ffn_hidden_size": width, "moe_router_topk": 2}
    more = [(name, Any) for name in extra if name not in known]
    mixture = make_dataclass("Mixture", more, bases=(ModelConfig,), frozen=True, kw_only=True)
    made: ModelConfig = mixture(**{**vars(model), **extra})
    return made
