"""What attention does besides sizes and positions, and the rules of these options."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtk.config.schema import option
from mtk.errors import Problem

if TYPE_CHECKING:
    from mtk.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Part of :class:`mtk.config.model.ModelConfig`."""

    window_size: int | None = option(
        None,
        help="A token looks at itself and the window-size - 1 tokens before it (default: at all "
        "before it).",
    )
    qk_layernorm: bool = option(
        False, help="Norm over the channels of each query and key head, before any rotation."
    )
    add_attention_bias: bool = option(
        False, help="Biases in query/key/value and in attention's output even if not elsewhere."
    )


def attention_problems(model: ModelConfig) -> Iterator[Problem]:
    """Violations of the model's options of attention."""
    window = model.window_size
    if window is not None and window < 1:
        rule = "must be at least 1: a token looks at itself"
        yield Problem("window_size", window, rule, "Nearest: 1; leave it out to look at all.")
    if model.add_attention_bias and model.add_bias_linear:
        rule = "add_bias_linear puts biases there already"
        fix = "Leave it out, or add --disable-bias-linear."
        yield Problem("add_attention_bias", True, rule, fix)
    for name in ("window_size", "qk_layernorm", "add_attention_bias"):
        value = getattr(model, name)
        if model.family != "gpt" and value not in (None, False):
            rule = f"family {model.family} has nothing of the kind here"
            yield Problem(name, value, rule, "Leave it out.")
