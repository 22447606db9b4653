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

# Where Llama 3's scaling starts from unless told otherwise; Megatron-LM knows no other value.
LLAMA3_ORIGINAL = 8192


@dataclass(frozen=True, kw_only=True)
class PositionOptions:
    """Part of :class:`mtk.config.model.ModelConfig`."""

    max_position_embeddings: int | None = option(
        None, help="Longest sequence the model accepts (default: as seq-length)."
    )
    position_embedding_type: Literal["learned", "rope", "alibi", "relative", "none"] = option(
        "learned",
        help="How positions enter the model: added to the embedding, by rotation, or by what "
        "attention adds to its scores (alibi: fixed slopes, relative: learned as in T5).",
    )
    rotary_base: float = option(10000.0, help="Base of the rotary frequencies.")
    rotary_percent: float = option(1.0, help="Share of each head's channels that is rotated.")
    rotary_interleaved: bool = option(
        False, help="Rotate neighbouring channels together instead of channel c and c + R/2."
    )
    rope_scaling_type: Literal["linear", "llama3", "yarn"] | None = option(
        None,
        help="How rotary frequencies are lowered for longer sequences (default: not at all).",
        shortcuts=(("--use-rope-scaling", "llama3"),),
    )
    rope_scaling_factor: float = option(8.0, help="By how much; Llama 3.1 has 8, Llama 3.2 has 32.")
    rope_low_freq_factor: float = option(
        1.0, help="llama3: wavelengths above original positions / this are scaled in full."
    )
    rope_high_freq_factor: float = option(
        4.0, help="llama3: wavelengths below original positions / this are not scaled."
    )
    rope_original_max_positions: int | None = option(
        None, help="Positions the model had before scaling (llama3 default: 8192)."
    )
    yarn_beta_fast: float = option(32.0, help="yarn: turns from which on nothing is scaled.")
    yarn_beta_slow: float = option(1.0, help="yarn: turns below which all is scaled.")
    yarn_truncate: bool = option(True, help="yarn: round the bounds between them to channels.")
    yarn_attention_factor: float | None = option(
        None, help="yarn: factor on cosines and sines (default: 0.1 ln(factor) + 1)."
    )
    relative_attention_num_buckets: int = option(32, help="relative: distances told apart.")
    relative_attention_max_distance: int = option(
        128, help="relative: distances from here on share the last bucket."
    )

    @property
    def rope_original_positions(self) -> int:
        """Positions before scaling, after derivation."""
        return self.rope_original_max_positions or LLAMA3_ORIGINAL

    @property
    def yarn_attention(self) -> float:
        """Factor on cosines and sines, after derivation (Peng et al. 2023, section 3.4)."""
        given, factor = self.yarn_attention_factor, self.rope_scaling_factor
        return 0.1 * math.log(factor) + 1.0 if given is None else given

    @property
    def positions_are_limited(self) -> bool:
        """A token's position is looked up in a table of ``positions`` rows."""
        return self.position_embedding_type in ("learned", "rope")

    @property
    def biases_scores(self) -> bool:
        """Positions are added to the scores of attention."""
        return self.position_embedding_type in ("alibi", "relative")


# Options that mean something only with these kinds of positions, and of scaling.
ROPE_OPTIONS = ("rotary_base", "rotary_percent", "rotary_interleaved", "rope_scaling_type")
SCALING_OPTIONS = {
    "rope_scaling_factor": ("linear", "llama3", "yarn"),
    "rope_low_freq_factor": ("llama3",),
    "rope_high_freq_factor": ("llama3",),
    "rope_original_max_positions": ("llama3", "yarn"),
    "yarn_beta_fast": ("yarn",),
    "yarn_beta_slow": ("yarn",),
    "yarn_truncate": ("yarn",),
    "yarn_attention_factor": ("yarn",),
}
RELATIVE_OPTIONS = ("relative_attention_num_buckets", "relative_attention_max_distance")


def position_problems(model: ModelConfig) -> Iterator[Problem]:
    """Violations of the model's options of position."""
    if model.positions_are_limited and model.seq_length > model.positions:
        rule = f"exceeds max_position_embeddings = {model.positions}"
        yield Problem("seq_length", model.seq_length, rule, "Raise the one or lower the other.")
    kind = model.position_embedding_type
    if kind == "rope":
        yield from _rope(model)
    else:
        yield from _only_with(model, ROPE_OPTIONS, "position_embedding_type = rope")
    yield from _scaling(model)
    if kind == "relative":
        yield from _relative(model)
    elif model.family != "t5":
        yield from _only_with(model, RELATIVE_OPTIONS, "position_embedding_type = relative")


def _default(name: str) -> object:
    return PositionOptions.__dataclass_fields__[name].default


def _only_with(model: ModelConfig, names: tuple[str, ...], what: str) -> Iterator[Problem]:
    for name in names:
        if getattr(model, name) != _default(name):
            rule = f"only means something with {what}"
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


def _scaling(model: ModelConfig) -> Iterator[Problem]:
    kind = model.rope_scaling_type
    for name, kinds in SCALING_OPTIONS.items():
        if kind not in kinds:
            yield from _only_with(model, (name,), f"rope_scaling_type = {' or '.join(kinds)}")
    if kind is None:
        return
    if not 1 <= model.rope_scaling_factor < math.inf:
        rule = "must be at least 1 and finite"
        yield Problem("rope_scaling_factor", model.rope_scaling_factor, rule, "Nearest: 1.0.")
    original = model.rope_original_max_positions
    if original is not None and original < 1:
        rule = "must be at least 1"
        yield Problem("rope_original_max_positions", original, rule, "Nearest: 1.")
    if kind == "llama3":
        yield from _ordered(model, "rope_low_freq_factor", "rope_high_freq_factor")
    if kind == "yarn":
        yield from _ordered(model, "yarn_beta_slow", "yarn_beta_fast")
        yield from _yarn(model)


def _ordered(model: ModelConfig, low: str, high: str) -> Iterator[Problem]:
    below, above = getattr(model, low), getattr(model, high)
    if not 0 < below < math.inf:
        yield Problem(low, below, "must be greater than 0 and finite", f"Usual: {_default(low)}.")
    elif not below < above < math.inf:
        rule = f"must be greater than {low} = {below:g} and finite"
        yield Problem(high, above, rule, f"Usual: {_default(high)}.")


def _yarn(model: ModelConfig) -> Iterator[Problem]:
    if model.rope_original_max_positions is None:
        rule = "yarn needs to know from where it scales"
        fix = "Give the positions the model was trained with, e.g. 4096."
        yield Problem("rope_original_max_positions", None, rule, fix)
    if model.rotary_base <= 1:
        rule = "must be greater than 1 with yarn"
        yield Problem("rotary_base", model.rotary_base, rule, "Usual: 10000.")
    factor = model.yarn_attention_factor
    if factor is not None and not 0 < factor < math.inf:
        yield Problem("yarn_attention_factor", factor, "must be greater than 0 and finite")


def _relative(model: ModelConfig) -> Iterator[Problem]:
    buckets, far = (getattr(model, name) for name in RELATIVE_OPTIONS)
    if buckets < 4 or buckets % 2:
        rule = "must be even and at least 4"
        nearest = max(4, buckets + buckets % 2)
        yield Problem("relative_attention_num_buckets", buckets, rule, f"Nearest: {nearest}.")
    elif far <= buckets // 2:
        rule = f"must exceed half of relative_attention_num_buckets = {buckets}"
        yield Problem("relative_attention_max_distance", far, rule, f"Nearest: {buckets // 2 + 1}.")
