"""How positions enter a model, and the rules of these options."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mtk.config.schema import option
from mtk.errors import Problem

if TYPE_CHECKING:
    from mtk.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class PositionOptions:
    """Part of :class:`mtk.config.model.ModelConfig`."""

    max_position_embeddings: int | None = option(
        None, help="Longest sequence the model accepts (default: as seq-length)."
    )
    position_embedding_type: Literal["learned", "rope", "none"] = option(
        "learned", help="How positions enter the model."
    )
    rotary_base: float = option(10000.0, help="Base of the rotary frequencies.")
    rotary_percent: float = option(1.0, help="Share of each head's channels that is rotated.")


def position_problems(model: ModelConfig) -> Iterator[Problem]:
    """Violations of the model's options of position."""
    if model.position_embedding_type != "none" and model.seq_length > model.positions:
        rule = f"exceeds max_position_embeddings = {model.positions}"
        yield Problem("seq_length", model.seq_length, rule, "Raise the one or lower the other.")
    if model.position_embedding_type == "rope":
        yield from _rope(model)
    else:
        for name, unset in (("rotary_base", 10000.0), ("rotary_percent", 1.0)):
            if getattr(model, name) != unset:
                rule = "only means something with position_embedding_type = rope"
                yield Problem(name, getattr(model, name), rule, "Leave it out.")


def _rope(model: ModelConfig) -> Iterator[Problem]:
    if not 0 < model.rotary_base < math.inf:
        yield Problem("rotary_base", model.rotary_base, "must be greater than 0 and finite")
    if not 0 < model.rotary_percent <= 1:
        yield Problem("rotary_percent", model.rotary_percent, "must be in (0, 1]")
        return
    rotated = int(model.head_size * model.rotary_percent)
    if rotated < 2 or rotated % 2:
        rule = f"rotates {rotated} of {model.head_size} channels; the number must be even, >= 2"
        yield Problem("rotary_percent", model.rotary_percent, rule, "Nearest: 1.0.")
