"""Rules between native weights and Megatron's whole ones, and the table of a model.

Shape suffixes: G groups (key/value heads), H query heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtk.config.model import ModelConfig
from mtk.convert.family import linear
from mtk.convert.mapping import Fuse, Rename, Rule, TiedCopy, WeightTable, for_layers


@dataclass(frozen=True)
class GroupedQKV(Fuse):
    """Query, key and value, interleaved by group: all queries of a group, its key, its value.

    sizes: outputs of each of the three. groups: G.
    """

    groups: int = 1

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        parts = [part.reshape(self.groups, -1, *part.shape[1:]) for part in native]
        return (torch.cat(parts, dim=1).flatten(0, 1),)

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        whole = foreign[0]
        grouped = whole.reshape(self.groups, -1, *whole.shape[1:])
        sizes = [size // self.groups for size in self.sizes]
        return tuple(part.flatten(0, 1) for part in torch.split(grouped, sizes, dim=1))


@dataclass(frozen=True)
class StackedGateUp(Fuse):
    """Gates and ups of all experts, [X, F, E] each, in one [X, 2F, E]."""

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (torch.cat(list(native), dim=1),)

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(part.contiguous() for part in torch.split(foreign[0], list(self.sizes), 1))


@dataclass(frozen=True)
class RepadRows(Rename):
    """A vocabulary's rows (of a bias: its values) padded to other sizes: native padding is zero,
    Megatron's repeats the last row, as its own converter does. rows: the true vocabulary."""

    rows: int
    native_rows: int
    foreign_rows: int

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        true = native[0][: self.rows]
        last = true[-1:].expand(self.foreign_rows - self.rows, *true.shape[1:])
        return (torch.cat((true, last)),)

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        extra = self.native_rows - self.rows
        none = (0, 0) * (foreign[0].ndim - 1)
        return (torch.nn.functional.pad(foreign[0][: self.rows], (*none, 0, extra)),)


def megatron_table(config: ModelConfig, rows: int, *, output_copy: bool = False) -> WeightTable:
    """One line a weight. rows: Megatron's padded vocabulary. output_copy: whether a tied
    model stores its matrix again for the last pipeline stage."""
    vocab, padded = config.vocab_size or 0, config.padded_vocab_size
    table = (vocab, padded, rows)
    words = "embedding.word_embeddings.weight"
    rules: list[Rule] = [RepadRows("embedding.tokens.weight", words, *table)]
    if config.position_embedding_type == "learned":
        rules.append(Rename("embedding.positions.weight", "embedding.position_embeddings.weight"))
    offset = config.normalization == "LayerNorm"
    n, m = "layers.{i}", "decoder.layers.{i}"
    attention = [
        *linear(f"{n}.attention_norm", f"{m}.input_layernorm", bias=offset),
        *linear(
            f"{n}.attention.output",
            f"{m}.self_attention.linear_proj",
            bias=config.attention_output_bias,
        ),
        *linear(f"{n}.mlp_norm", f"{m}.pre_mlp_layernorm", bias=offset),
    ]
    if config.qk_layernorm:
        for native, foreign in (("query_norm", "q_layernorm"), ("key_norm", "k_layernorm")):
            own = f"{m}.self_attention.{foreign}"
            attention += linear(f"{n}.attention.{native}", own, bias=offset)
    rules += for_layers(config.num_layers, attention)
    rules += for_layers(config.num_layers, _qkv(config))
    for layer in range(config.num_layers):
        rules += _experts(config, layer) if config.has_experts(layer) else _mlp(config, layer)
    rules += linear("final_norm", "decoder.final_layernorm", bias=offset)
    if config.family == "bert":
        rules += _bert(config, table)
    copies: tuple[TiedCopy, ...] = ()
    if config.untie_embeddings_and_output_weights:
        rules.append(RepadRows("output.weight", "output_layer.weight", *table))
    elif output_copy:
        copies = (TiedCopy("output_layer.weight", words),)
    return WeightTable(tuple(rules), copies)


def _bert(config: ModelConfig, table: tuple[int, int, int]) -> list[Rule]:
    """Embedding of segments and heads. table: rows of the vocabulary as for RepadRows."""
    rules: list[Rule] = [
        Rename("embedding.types.weight", "embedding.tokentype_embeddings.weight"),
        *linear("transform.dense", "lm_head.dense", bias=True),
        *linear("transform.norm", "lm_head.layernorm", bias=True),
        RepadRows("output_bias", "lm_head.bias", *table),
    ]
    if config.bert_binary_head:
        rules += linear("pooler.dense", "pooler.dense", bias=True)
        rules += linear("order", "binary_head", bias=True)
    return rules


def _qkv(config: ModelConfig) -> list[GroupedQKV]:
    queries = config.num_attention_heads * config.head_size
    keys = config.query_groups * config.head_size
    return [
        GroupedQKV(
            tuple(f"layers.{{i}}.attention.{part}.{kind}" for part in ("query", "key", "value")),
            f"decoder.layers.{{i}}.self_attention.linear_qkv.{kind}",
            (queries, keys, keys),
            groups=config.query_groups,
        )
        for kind in (("weight", "bias") if config.qkv_bias else ("weight",))
    ]


def _mlp(config: ModelConfig, layer: int) -> list[Rule]:
    n, m, bias = f"layers.{layer}.mlp", f"decoder.layers.{layer}.mlp", config.add_bias_linear
    rules: list[Rule] = [*linear(f"{n}.down", f"{m}.linear_fc2", bias=bias)]
    if config.activation != "swiglu":
        return [*rules, *linear(f"{n}.up", f"{m}.linear_fc1", bias=bias)]
    for kind in ("weight", "bias") if bias else ("weight",):
        halves = (f"{n}.gate.{kind}", f"{n}.up.{kind}")
        rules.append(Fuse(halves, f"{m}.linear_fc1.{kind}", (config.ffn_size,) * 2))
    return rules


def _experts(config: ModelConfig, layer: int) -> list[Rule]:
    n, m = f"layers.{layer}.mlp", f"decoder.layers.{layer}.mlp"
    first, gated = f"{m}.experts.linear_fc1.weight", config.activation == "swiglu"
    rules: list[Rule] = [
        Rename(f"{n}.router.weight", f"{m}.router.weight"),
        Rename(f"{n}.experts.down", f"{m}.experts.linear_fc2.weight"),
    ]
    if gated:
        halves = (f"{n}.experts.gate", f"{n}.experts.up")
        rules.append(StackedGateUp(halves, first, (config.moe_ffn_size,) * 2))
    else:
        rules.append(Rename(f"{n}.experts.up", first))
    if config.moe_router_enable_expert_bias:
        rules.append(Rename(f"{n}.router.expert_bias", f"{m}.router.expert_bias"))
    return rules + _shared_expert(config, f"{n}.shared", f"{m}.shared_experts")


def _shared_expert(config: ModelConfig, native: str, foreign: str) -> list[Rule]:
    width = config.moe_shared_expert_intermediate_size
    if width is None:
        return []
    rules: list[Rule] = [Rename(f"{native}.down.weight", f"{foreign}.linear_fc2.weight")]
    if config.activation == "swiglu":
        halves = (f"{native}.gate.weight", f"{native}.up.weight")
        rules.append(Fuse(halves, f"{foreign}.linear_fc1.weight", (width,) * 2))
    else:
        rules.append(Rename(f"{native}.up.weight", f"{foreign}.linear_fc1.weight"))
    if config.moe_shared_expert_gate:
        rules.append(Rename(f"{native}.token_gate.weight", f"{foreign}.gate_weight"))
    return rules
