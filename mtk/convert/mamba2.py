"""Mamba-2 (Dao & Gu 2024) in the layout of transformers' ``Mamba2ForCausalLM``.

Its projection is one matrix: gate (z), x, B, C and steps (dt), in this order; its convolution
has x, B and C side by side, as ``nn.Conv1d`` keeps channels. transformers clamps steps
(``time_step_limit``) when it reads a prompt, but not when it continues from its cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mtk.config.mamba import MAMBA, mamba_sizes
from mtk.config.model import ModelConfig
from mtk.convert.family import Family, ForeignConfig, linear, reasons_against
from mtk.convert.mapping import CutRows, Fuse, Rename, Rule, TiedCopy, WeightTable, for_layers

# A published config.json names no length; that of the published models.
LENGTH = 2048
# Longer than any: what a length not named is told by.
UNBOUNDED = 2**31


@dataclass(frozen=True)
class FuseChannels(Fuse):
    """Convolutions [C, W] stacked by channels into one [C, 1, W]."""

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (super().to_foreign(native)[0][:, None],)

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return super().to_native([foreign[0].squeeze(1)])


def reasons(config: ModelConfig) -> list[str]:
    """Everything that keeps ``config`` from being a Mamba-2."""
    own = [name for name in vars(config) if name.startswith("mamba_")]
    takes = {name: ((getattr(config, name),), "") for name in (*own, "activation")}
    takes |= {
        "hybrid_layer_pattern": ((config.hybrid_layer_pattern,), ""),
        "position_embedding_type": (("none",), "needs none"),
        "normalization": (("RMSNorm",), "has RMSNorm"),
    }
    found = reasons_against(config, "Mamba2", takes)
    pattern = config.hybrid_layer_pattern
    if pattern is None or set(pattern) != {MAMBA}:
        found.append(f"hybrid_layer_pattern = {pattern}: every layer of Mamba2 is one (M)")
    sizes = mamba_sizes(config)
    if config.has_mamba and sizes.width % config.hidden_size:
        found.append(
            f"mamba_num_heads x mamba_head_dim = {sizes.width}: transformers wants a multiple of "
            f"hidden_size = {config.hidden_size}"
        )
    return found


def to_config(config: ModelConfig) -> dict[str, Any]:
    """The model's part of ``config.json``."""
    sizes = mamba_sizes(config)
    limit = config.mamba_dt_limit
    return {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_heads": sizes.heads,
        "head_dim": sizes.head,
        "expand": sizes.width // config.hidden_size,
        "n_groups": sizes.groups,
        "state_size": sizes.state,
        "conv_kernel": sizes.conv,
        "use_bias": config.add_bias_linear,
        "use_conv_bias": config.mamba_conv_bias,
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_epsilon,
        "residual_in_fp32": True,
        "chunk_size": config.mamba_chunk_size,
        "time_step_min": config.mamba_dt_range[0],
        "time_step_max": config.mamba_dt_range[1],
        "time_step_floor": config.mamba_dt_floor,
        **({} if limit is None else {"time_step_limit": list(limit)}),
        "initializer_range": config.init_method_std,
        # True would make transformers scale the weights down each time that it loads them.
        "rescale_prenorm_residual": False,
        "tie_word_embeddings": not config.untie_embeddings_and_output_weights,
        "use_cache": True,
        "mtk": {"seq_length": config.seq_length},
    }


def from_config(found: ForeignConfig) -> ModelConfig:
    """The native configuration of a Mamba-2's ``config.json``. Raises ConversionError."""
    found.require("hidden_act", ("silu", "swish"), "only silu is supported")
    found.require(
        "rescale_prenorm_residual",
        (False, None),
        "transformers scales out_proj down whenever it loads such a model; set it to false if "
        "the files hold the weights that are meant",
    )
    hidden = found.get("hidden_size", int, 4096)
    heads, head = found.get("num_heads", int, 128), found.get("head_dim", int, 64)
    expand = found.get("expand", int, 2)
    if hidden * expand != heads * head:
        found.complaints.append(
            f"num_heads x head_dim = {heads * head} is not expand x hidden_size = {hidden * expand}"
        )
    length = found.training_length(UNBOUNDED)
    dt_range = (
        found.get("time_step_min", float, 0.001),
        found.get("time_step_max", float, 0.1),
    )
    return found.model(
        hybrid_layer_pattern=MAMBA * max(0, found.get("num_hidden_layers", int, 64)),
        hidden_size=hidden,
        mamba_num_heads=heads,
        mamba_head_dim=head,
        mamba_num_groups=found.get("n_groups", int, 8),
        mamba_state_dim=found.get("state_size", int, 128),
        mamba_conv_width=found.get("conv_kernel", int, 4),
        mamba_conv_bias=found.get("use_conv_bias", bool, True),
        mamba_chunk_size=found.get("chunk_size", int, 256),
        mamba_dt_range=dt_range,
        mamba_dt_floor=found.get("time_step_floor", float, 1e-4),
        mamba_dt_limit=_limit(found),
        seq_length=LENGTH if length == UNBOUNDED else length,
        position_embedding_type="none",
        normalization="RMSNorm",
        norm_epsilon=found.get("layer_norm_epsilon", float, 1e-5),
        add_bias_linear=found.get("use_bias", bool, False),
        untie_embeddings_and_output_weights=not found.get("tie_word_embeddings", bool, False),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=found.get("initializer_range", float, 0.1),
        vocab_size=found.get("vocab_size", int, 32768),
    )


def _limit(found: ForeignConfig) -> tuple[float, float] | None:
    """``time_step_limit``; (0, infinity) is none."""
    value = found.data.get("time_step_limit")
    if value is None:
        return None
    numbers = [_number(part) for part in value] if isinstance(value, list) else []
    if len(numbers) != 2 or None in numbers:
        found.complaints.append(f"time_step_limit = {value!r} is not two numbers")
        return None
    low, high = (float(part) for part in numbers if part is not None)
    if high == math.inf and low <= 0:
        return None
    if high == math.inf:
        found.complaints.append(f"time_step_limit = {value!r}: mtk has limits on both sides only")
        return None
    return (max(low, 0.0), high)


def _number(part: Any) -> float | None:
    """transformers writes infinity as an object, others as Python does."""
    if isinstance(part, dict):
        return math.inf if part == {"__float__": "Infinity"} else None
    return part if isinstance(part, int | float) and not isinstance(part, bool) else None


def weights(config: ModelConfig) -> WeightTable:
    """One line a weight."""
    vocab, padded = config.vocab_size or 0, config.padded_vocab_size
    sizes = mamba_sizes(config)
    n, h = "layers.{i}.mamba", "backbone.layers.{i}.mixer"
    parts = ("gate", "input", "b", "c", "dt")
    rows = (sizes.width, sizes.width, sizes.shared, sizes.shared, sizes.heads)
    convolutions = ("conv_input", "conv_b", "conv_c")

    def projection(kind: str) -> Fuse:
        names = tuple(f"{n}.{part}.{kind}" for part in parts)
        return Fuse(names, f"{h}.in_proj.{kind}", rows)

    def convolution(kind: str, rule: type[Fuse]) -> Fuse:
        names = tuple(f"{n}.{part}.{kind}" for part in convolutions)
        return rule(names, f"{h}.conv1d.{kind}", rows[1:4])

    fused = [projection("weight"), convolution("weight", FuseChannels)]
    fused += [projection("bias")] if config.add_bias_linear else []
    fused += [convolution("bias", Fuse)] if config.mamba_conv_bias else []
    rules: list[Rule] = [
        CutRows("embedding.tokens.weight", "backbone.embeddings.weight", vocab, padded),
        *for_layers(config.num_layers, fused),
        *for_layers(
            config.num_layers,
            [
                *linear("layers.{i}.mamba_norm", "backbone.layers.{i}.norm", bias=False),
                Rename(f"{n}.dt_bias", f"{h}.dt_bias"),
                Rename(f"{n}.a_log", f"{h}.A_log"),
                Rename(f"{n}.skip", f"{h}.D"),
                *linear(f"{n}.norm", f"{h}.norm", bias=False),
                *linear(f"{n}.output", f"{h}.out_proj", bias=config.add_bias_linear),
            ],
        ),
        *linear("final_norm", "backbone.norm_f", bias=False),
    ]
    copies: tuple[TiedCopy, ...] = (TiedCopy("lm_head.weight", "backbone.embeddings.weight"),)
    if config.untie_embeddings_and_output_weights:
        rules.append(CutRows("output.weight", "lm_head.weight", vocab, padded))
        copies = ()
    return WeightTable(tuple(rules), copies)


MAMBA2 = Family(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    blocks="backbone.layers",
    prefix="backbone.",
    reasons=reasons,
    to_config=to_config,
    from_config=from_config,
    weights=weights,
    patterns=True,
)
