"""What a model is: sizes and kinds of its parts. No mesh, no optimizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from mtk.config.attention import AttentionOptions, attention_problems
from mtk.config.blocks import BlockOptions, block_problems
from mtk.config.encoder import EncoderOptions, encoder_problems
from mtk.config.heads import TASKS
from mtk.config.layer_pattern import has_experts
from mtk.config.lora import LoraConfig, lora_problems
from mtk.config.mamba import EXPERTS, MambaOptions, implied_by_pattern, mamba_problems, mamba_sizes
from mtk.config.moe import AUX_LOSS_COEFF, MoeOptions, moe_problems
from mtk.config.nearest import nearest_divisor, nearest_multiple
from mtk.config.positions import PositionOptions, position_problems
from mtk.config.schema import group, option
from mtk.errors import Problem

# Activations that multiply two matrices' outputs (Shazeer 2020).
GATED = ("swiglu", "geglu", "geglu-tanh")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(
    PositionOptions, AttentionOptions, BlockOptions, MoeOptions, MambaOptions, EncoderOptions
):
    """Sizes follow Megatron's names; what is None is derived in :meth:`derived`."""

    family: Literal["gpt", "bert", "t5"] = option("gpt", help="Kind of model.")
    num_layers: int = option(help="Transformer layers.")
    hidden_size: int = option(help="Width of the residual stream.")
    num_attention_heads: int = option(help="Query heads.")
    num_query_groups: int | None = option(
        None, help="Key/value heads: fewer than heads is GQA, 1 is MQA (default: as heads)."
    )
    ffn_hidden_size: int | None = option(
        None, help="Width of the MLP (default: 4 x hidden, gated 8/3 in steps of 64)."
    )
    kv_channels: int | None = option(None, help="Width of a head (default: hidden / heads).")
    seq_length: int = option(help="Tokens per training sample.")
    normalization: Literal["LayerNorm", "RMSNorm"] = option("LayerNorm", help="Kind of norm.")
    norm_epsilon: float = option(1e-5, help="Added to the variance in norms.")
    activation: Literal[
        "gelu", "gelu-tanh", "relu", "squared-relu", "swiglu", "geglu", "geglu-tanh"
    ] = option(
        "gelu",
        help="Non-linearity of the MLP; gelu is exact, gelu-tanh is GPT-2's approximation; "
        "swiglu and geglu multiply it with a second matrix's output.",
        shortcuts=(("--swiglu", "swiglu"), ("--squared-relu", "squared-relu")),
    )
    add_bias_linear: bool = option(
        True, help="Biases in linear layers.", shortcuts=(("--disable-bias-linear", False),)
    )
    add_qkv_bias: bool = option(False, help="Biases in query/key/value even if not elsewhere.")
    untie_embeddings_and_output_weights: bool = option(
        False, help="Give the output layer a matrix of its own."
    )
    hidden_dropout: float = option(0.1, help="Dropout on embeddings and residual branches.")
    attention_dropout: float = option(0.1, help="Dropout on attention probabilities.")
    init_method_std: float = option(
        0.02, help="Standard deviation of initial weights; output projections use /sqrt(2 layers)."
    )
    vocab_size: int | None = option(
        None, help="Number of token ids (default: what the data's tokenizer has)."
    )
    make_vocab_size_divisible_by: int = option(
        128, help="The embedding is padded to a multiple of this, whatever the layout."
    )
    lora: LoraConfig = group(LoraConfig, title="Adapters", hidden=True)

    def in_head(self, parameter: str) -> bool:
        """Whether a parameter belongs to the head of a task."""
        return self.task_head is not None and parameter.startswith(("pooler.", "classifier."))

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding; needs ``vocab_size``."""
        if self.vocab_size is None:
            raise ValueError("vocab_size is not known yet")
        unit = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // unit) * unit

    @property
    def head_size(self) -> int:
        """Channels of one head, after derivation."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Number of key/value heads, after derivation."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Width of the MLP, after derivation."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.gated:
            return int(4 * self.hidden_size * 2 / 3 / 64) * 64 or 64
        return 4 * self.hidden_size

    @property
    def moe_ffn_size(self) -> int:
        """Width of one expert, after derivation."""
        given = self.moe_ffn_hidden_size
        return self.ffn_size if given is None else given

    def has_experts(self, layer: int) -> bool:
        """Whether layer number ``layer`` is an MoE layer; Megatron counts them from 0 too."""
        if self.hybrid_layer_pattern is not None:
            return self.hybrid_layer_pattern[layer] == EXPERTS
        return self.num_experts is not None and has_experts(self.moe_layer_freq, layer)

    @property
    def aux_loss_coeff(self) -> float:
        """Weight of the balancing loss, after derivation."""
        if self.moe_aux_loss_coeff is not None:
            return self.moe_aux_loss_coeff
        return AUX_LOSS_COEFF if self.moe_router_load_balancing_type == "seq_aux_loss" else 0.0

    @property
    def moe_layers(self) -> int:
        """How many layers have experts."""
        return sum(self.has_experts(layer) for layer in range(self.num_layers))

    @property
    def positions(self) -> int:
        """Longest accepted sequence, after derivation."""
        return self.max_position_embeddings or self.seq_length

    @property
    def head_activation(self) -> str:
        """Non-linearity before the output matrix of BERT."""
        return self.bert_head_activation or self.activation

    @property
    def gated(self) -> bool:
        """The MLP has a gate beside its input matrix."""
        return self.activation in GATED

    @property
    def qkv_bias(self) -> bool:
        return self.add_bias_linear or self.add_qkv_bias or self.add_attention_bias

    @property
    def attention_output_bias(self) -> bool:
        return self.add_bias_linear or self.add_attention_bias

    @property
    def mlp_bias(self) -> bool:
        return self.add_bias_linear or self.add_mlp_bias

    def problems(self) -> Iterator[Problem]:
        yield from self._positive()
        if self.num_attention_heads < 1 or self.hidden_size < 1:
            return
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            rule = f"must divide by num_attention_heads = {self.num_attention_heads}"
            fix = f"Nearest: {nearest_multiple(self.hidden_size, self.num_attention_heads)}."
            yield Problem("hidden_size", self.hidden_size, rule, fix)
        groups = self.query_groups
        if groups >= 1 and self.num_attention_heads % groups:
            rule = f"must divide num_attention_heads = {self.num_attention_heads}"
            fix = f"Nearest: {nearest_divisor(groups, self.num_attention_heads)}."
            yield Problem("num_query_groups", groups, rule, fix)
        yield from position_problems(self)
        yield from attention_problems(self)
        yield from block_problems(self)
        yield from moe_problems(self)
        yield from encoder_problems(self)
        yield from mamba_problems(self)
        yield from lora_problems(self)

    def _positive(self) -> Iterator[Problem]:
        for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length"):
            if getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be at least 1")
        for name in (
            "num_query_groups",
            "ffn_hidden_size",
            "kv_channels",
            "max_position_embeddings",
            "vocab_size",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Problem(name, value, "must be at least 1")
        if self.make_vocab_size_divisible_by < 1:
            found = self.make_vocab_size_divisible_by
            yield Problem("make_vocab_size_divisible_by", found, "must be at least 1")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be in [0, 1)")
        for name in ("init_method_std", "norm_epsilon"):
            if not 0 <= getattr(self, name) < math.inf:
                yield Problem(name, getattr(self, name), "must be 0 or more and finite")

    def derived(self) -> Self:
        own_head = None if self.head_activation == self.activation else self.bert_head_activation
        return dataclasses.replace(
            self,
            num_query_groups=self.query_groups,
            ffn_hidden_size=self.ffn_size,
            moe_ffn_hidden_size=self.moe_ffn_size if self.num_experts else None,
            moe_aux_loss_coeff=self.aux_loss_coeff if self.num_experts else None,
            kv_channels=self.head_size,
            max_position_embeddings=self.positions,
            mamba_num_heads=mamba_sizes(self).heads if self.has_mamba else None,
            num_classes=None if self.task_head is None else TASKS[self.task_head].classes,
            bert_head_activation=own_head,
        )

    @classmethod
    def implied(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Options that others decide where they are not given themselves."""
        return implied_by_pattern(given)
