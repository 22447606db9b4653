"""Layers of different kinds (Mamba-2, attention, MLP, experts) and the rules of these options.

A pattern names the kind of each layer by a letter, as Megatron-core does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtk.config.nearest import divisors, nearest, nearest_divisor
from mtk.config.schema import option
from mtk.errors import Problem

if TYPE_CHECKING:
    from mtk.config.model import ModelConfig

MAMBA, ATTENTION, MLP, EXPERTS = "M", "*", "-", "E"
KINDS: Mapping[str, str] = {
    MAMBA: "Mamba-2",
    ATTENTION: "attention",
    MLP: "MLP",
    EXPERTS: "mixture of experts",
}
# What else may stand in a pattern of Megatron-core's, and what to do about it here.
FOREIGN: Mapping[str, str] = {
    "|": "cuts stages; give their layers with --pipeline-split",
    "/": "begins layers of multi-token prediction, which this version has not",
    "G": "is a gated delta net, which this version has not",
    "D": "is sparse attention, which this version has not",
    "+": "is latent attention, which this version has not",
}


@dataclass(frozen=True, kw_only=True)
class MambaOptions:
    """Part of :class:`mtk.config.model.ModelConfig`."""

    hybrid_layer_pattern: str | None = option(
        None,
        help="Kind of each layer: M Mamba-2, * attention, - MLP, E mixture of experts, each with "
        "a norm and a residual of its own (default: attention and MLP in every layer).",
        aliases=("--hybrid-override-pattern",),
    )
    mamba_num_heads: int | None = option(
        None, help="Heads of a Mamba layer (default: 2 x hidden / mamba-head-dim)."
    )
    mamba_head_dim: int = option(64, help="Channels of a Mamba head.")
    mamba_state_dim: int = option(128, help="Size of the state of each channel.")
    mamba_num_groups: int = option(8, help="Sets of B and C, each shared by some of the heads.")
    mamba_conv_width: int = option(4, help="Tokens that the causal convolution looks at.")
    mamba_conv_bias: bool = option(True, help="A bias in the causal convolution.")
    mamba_chunk_size: int = option(
        128, help="Tokens that are mixed by matrices; changes speed and memory, not the model."
    )
    mamba_dt_range: tuple[float, float] = option(
        (1e-3, 0.1), help="Step sizes that heads start with: the least and the greatest."
    )
    mamba_dt_floor: float = option(1e-4, help="No head starts with a smaller step size.")
    mamba_dt_limit: tuple[float, float] | None = option(
        None, help="Step sizes are kept in this range (default: any)."
    )
    mamba_a_range: tuple[float, float] = option(
        (1.0, 16.0), help="Decay rates that heads start with: the least and the greatest."
    )

    @property
    def has_mamba(self) -> bool:
        return MAMBA in (self.hybrid_layer_pattern or "")

    @property
    def state_groups(self) -> int | None:
        """Groups of B and C that tensor-parallel ranks may have to share; None without Mamba."""
        return self.mamba_num_groups if self.has_mamba else None

    @property
    def has_attention(self) -> bool:
        """Some layer attends; without a pattern all of them do."""
        return self.hybrid_layer_pattern is None or ATTENTION in self.hybrid_layer_pattern

    @property
    def has_mlp(self) -> bool:
        """Some layer has a dense MLP, or could have one; without a pattern all of them."""
        return self.hybrid_layer_pattern is None or MLP in self.hybrid_layer_pattern


@dataclass(frozen=True)
class MambaSizes:
    """Of one Mamba-2 layer: heads of ``head`` channels, ``groups`` of B and C with ``state``
    numbers each, and the tokens a convolution looks at."""

    heads: int
    head: int
    groups: int
    state: int
    conv: int

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head

    @property
    def shared(self) -> int:
        """Numbers of B, or of C, of a token."""
        return self.groups * self.state


def mamba_sizes(model: ModelConfig) -> MambaSizes:
    """After derivation."""
    head = max(1, model.mamba_head_dim)
    heads = model.mamba_num_heads
    if heads is None:
        heads = max(1, 2 * model.hidden_size // head)
    groups, state = model.mamba_num_groups, model.mamba_state_dim
    return MambaSizes(heads, head, groups, state, model.mamba_conv_width)


def implied_by_pattern(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a pattern says by itself: how many layers there are, and that without attention
    no heads need to be named."""
    pattern = given.get("hybrid_layer_pattern")
    if pattern is None:
        return {}
    implied: dict[str, Any] = {"num_layers": len(pattern)}
    if ATTENTION not in pattern:
        implied["num_attention_heads"] = 1
    return implied


def mamba_problems(model: ModelConfig) -> Iterator[Problem]:
    """Violations of the pattern and of the options of Mamba layers."""
    pattern = model.hybrid_layer_pattern
    if pattern is not None:
        yield from _pattern(model, pattern)
    if model.has_mamba:
        yield from _sizes(model)
        yield from _ranges(model)
    else:
        yield from _unused(model)


def _pattern(model: ModelConfig, pattern: str) -> Iterator[Problem]:
    name = "hybrid_layer_pattern"
    listed = ", ".join(f"{letter} ({kind})" for letter, kind in KINDS.items())
    if not pattern:
        yield Problem(name, pattern, "names no layer", f"Letters: {listed}.")
    for letter in sorted(set(pattern) - set(KINDS)):
        rule = f"{letter!r} {FOREIGN.get(letter, 'is no kind of layer')}"
        yield Problem(name, pattern, rule, f"Letters: {listed}.")
    if model.num_layers != len(pattern):
        rule = f"must be the pattern's {len(pattern)} layers"
        yield Problem("num_layers", model.num_layers, rule, "Leave it out: the pattern says it.")
    if model.family != "gpt":
        rule = f"family {model.family} has layers of one kind"
        yield Problem(name, pattern, rule, "Use --family gpt, or leave it out.")
    if (EXPERTS in pattern) != (model.num_experts is not None):
        has = "has layers of experts" if EXPERTS in pattern else "has no layer of experts (E)"
        rule = f"{has}, and num_experts is {model.num_experts}"
        yield Problem(name, pattern, rule, "Give both, or neither.")
    if model.moe_layer_freq != "1":
        rule = "the pattern already says which layers have experts"
        yield Problem("moe_layer_freq", model.moe_layer_freq, rule, "Leave it out.")
    yield from _without_a_layer(model)


def _without_a_layer(model: ModelConfig) -> Iterator[Problem]:
    """Options of kinds that the pattern does not have; derived values are no options."""
    if not model.has_attention:
        rule = "only means something with attention, of which the pattern has none (*)"
        if model.num_attention_heads != 1:
            fix = "Leave it out, or add a *."
            yield Problem("num_attention_heads", model.num_attention_heads, rule, fix)
        if model.position_embedding_type in ("rope", "alibi", "relative"):
            kind, fix = model.position_embedding_type, "Use --position-embedding-type none."
            yield Problem("position_embedding_type", kind, rule, fix)
        for name in ("add_qkv_bias", "add_attention_bias", "qk_layernorm", "window_size"):
            if getattr(model, name):
                yield Problem(name, getattr(model, name), rule, "Leave it out.")
    if model.use_parallel_residual:
        rule = "puts two parts in a layer; each layer of a pattern has one"
        yield Problem("use_parallel_residual", True, rule, "Leave it out.")
    if model.add_mlp_bias and not model.has_mlp:
        rule = "only means something with an MLP, of which the pattern has none (-)"
        yield Problem("add_mlp_bias", True, rule, "Leave it out.")
    plain = dataclasses.replace(model, ffn_hidden_size=None).ffn_size
    experts = model.num_experts is not None and model.moe_ffn_hidden_size is None
    if not (model.has_mlp or experts) and model.ffn_size != plain:
        rule = "only means something with an MLP, of which the pattern has none (-)"
        yield Problem("ffn_hidden_size", model.ffn_size, rule, "Leave it out.")


def _unused(model: ModelConfig) -> Iterator[Problem]:
    for field in dataclasses.fields(MambaOptions):
        value = getattr(model, field.name)
        if field.name != "hybrid_layer_pattern" and value != field.default:
            rule = "only means something with Mamba layers"
            fix = "Add M to --hybrid-layer-pattern, or leave it out."
            yield Problem(field.name, value, rule, fix)


def _sizes(model: ModelConfig) -> Iterator[Problem]:
    least = {
        "mamba_num_heads": 1,
        "mamba_head_dim": 1,
        "mamba_state_dim": 1,
        "mamba_num_groups": 1,
        "mamba_conv_width": 2,
        "mamba_chunk_size": 1,
    }
    wrong = False
    for name, lowest in least.items():
        value = getattr(model, name)
        if value is not None and value < lowest:
            wrong = True
            yield Problem(name, value, f"must be at least {lowest}", f"Nearest: {lowest}.")
    if wrong:
        return
    if model.mamba_num_heads is None and 2 * model.hidden_size % model.mamba_head_dim:
        rule = f"must divide 2 x hidden_size = {2 * model.hidden_size}, or the heads be given"
        fix = f"{nearest(model.mamba_head_dim, divisors(2 * model.hidden_size))} "
        yield Problem("mamba_head_dim", model.mamba_head_dim, rule, fix + "Or --mamba-num-heads.")
        return
    heads, groups = mamba_sizes(model).heads, model.mamba_num_groups
    if heads % groups:
        rule = f"must divide the {heads} heads of a Mamba layer"
        yield Problem(
            "mamba_num_groups", groups, rule, f"Nearest: {nearest_divisor(groups, heads)}."
        )


def _ranges(model: ModelConfig) -> Iterator[Problem]:
    for name in ("mamba_dt_range", "mamba_a_range"):
        low, high = getattr(model, name)
        if not 0 < low <= high < math.inf:
            rule = "must be two finite numbers greater than 0, the lower one first"
            yield Problem(name, (low, high), rule)
    if not 0 < model.mamba_dt_floor < math.inf:
        yield Problem("mamba_dt_floor", model.mamba_dt_floor, "must be greater than 0 and finite")
    if model.mamba_dt_limit is not None:
        low, high = model.mamba_dt_limit
        if not 0 <= low < high < math.inf:
            rule = "must be two finite numbers of at least 0, the lower one first"
            yield Problem("mamba_dt_limit", (low, high), rule, "Leave it out for any step size.")
