"""Seeded faults of this format: in names, cuts, orders and arguments, as data.

A fault replaces what several modules imported; where it can, it is made in both directions, so
that a round trip undoes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mtk.config.model import ModelConfig
from mtk.convert.mapping import Fuse, Rename, Rule, WeightTable
from mtk.convert.megatron import open_checkpoint, pieces, writing
from mtk.convert.megatron.rules import GroupedQKV, RepadRows, StackedGateUp
from mtk.convert.megatron.weights import Cut, Weight
from tests.convert.faults import Lost, Permuted

Fault = Callable[[pytest.MonkeyPatch], None]


def table(change: Callable[[Rule], Rule]) -> Fault:
    """Every rule between native weights and Megatron's, changed."""

    def fault(patch: pytest.MonkeyPatch) -> None:
        true = writing.megatron_table

        def changed(config: ModelConfig, rows: int, **options: Any) -> WeightTable:
            made = true(config, rows, **options)
            return replace(made, rules=tuple(change(rule) for rule in made.rules))

        for module in (open_checkpoint, writing):
            patch.setattr(module, "megatron_table", changed)

    return fault


def cuts(part: str, cut: Cut) -> Fault:
    """Weights whose names hold ``part`` are cut another way."""

    def fault(patch: pytest.MonkeyPatch) -> None:
        true = writing.weights_of

        def changed(config: ModelConfig, rows: int) -> list[Weight]:
            return [
                replace(weight, cut=cut) if part in weight.part else weight
                for weight in true(config, rows)
            ]

        for module in (pieces, writing):
            patch.setattr(module, "weights_of", changed)

    return fault


def config(**values: Any) -> Fault:
    """The native configuration is read with other values. A fault of reading."""

    def fault(patch: pytest.MonkeyPatch) -> None:
        true = open_checkpoint.model_config
        patch.setattr(
            open_checkpoint, "model_config", lambda *a, **k: replace(true(*a, **k), **values)
        )

    return fault


def arguments(writer: str = "write_arguments", **values: Any) -> Fault:
    """Arguments are written with other values. A fault of writing."""

    def fault(patch: pytest.MonkeyPatch) -> None:
        true = getattr(writing, writer)
        patch.setattr(writing, writer, lambda *a: true(*a) | values)

    return fault


def renamed(old: str, new: str) -> Fault:
    """Two native weights trade places in rules of one weight."""

    def change(rule: Rule) -> Rule:
        if isinstance(rule, Rename):
            swap = {old: new, new: old}
            found = re.sub(f"{old}|{new}", lambda match: swap[match[0]], rule.native)
            return replace(rule, native=found)
        return rule

    return table(change)


def natives(kind: type[Fuse], order: Sequence[int]) -> Fault:
    """Parts of fused weights in another order."""

    def change(rule: Rule) -> Rule:
        if isinstance(rule, kind):
            return replace(rule, natives=tuple(rule.natives[index] for index in order))
        return rule

    return table(change)


def one(ending: str, make: Callable[[Rename], Rule]) -> Fault:
    """Rules of native weights with this ending, made anew."""
    return table(
        lambda rule: (
            make(rule) if isinstance(rule, Rename) and rule.native.endswith(ending) else rule
        )
    )


def lost(ending: str, value: float) -> Fault:
    return one(ending, lambda rule: Lost(rule.native, rule.foreign, value))


def permuted(ending: str, order: Callable[[int], Tensor]) -> Fault:
    return one(ending, lambda rule: Permuted(rule.native, rule.foreign, order))


@dataclass(frozen=True)
class PlainQKV(GroupedQKV):
    """All queries, all keys, all values: the order of version 0 under version 3."""

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return Fuse.to_foreign(self, native)

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return Fuse.to_native(self, foreign)


@dataclass(frozen=True)
class ChannelQKV(GroupedQKV):
    """Channel by channel: the order of version 1 under version 3. Without grouped attention."""

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (torch.stack(list(native), dim=1).flatten(0, 1),)

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(foreign[0][part::3].contiguous() for part in range(3))


@dataclass(frozen=True)
class ShiftedRows(RepadRows):
    """Every id gets its neighbour's row."""

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        true = native[0][: self.rows].roll(1, 0)
        return super().to_foreign((true,))

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return super().to_native((foreign[0][: self.rows].roll(-1, 0),))


def qkv(kind: type[GroupedQKV]) -> Fault:
    def change(rule: Rule) -> Rule:
        if isinstance(rule, GroupedQKV):
            return kind(rule.natives, rule.foreign, rule.sizes, groups=rule.groups)
        return rule

    return table(change)


def shifted_rows(rule: Rename) -> Rule:
    assert isinstance(rule, RepadRows)
    return ShiftedRows(rule.native, rule.foreign, rule.rows, rule.native_rows, rule.foreign_rows)


def neighbour_layers(rule: Rule) -> Rule:
    """Layers of a pair trade places: off by one within a stage of two."""

    def moved(name: str) -> str:
        return re.sub(r"^layers\.(\d+)", lambda m: f"layers.{int(m[1]) ^ 1}", name)

    if isinstance(rule, Rename):
        return replace(rule, native=moved(rule.native))
    if isinstance(rule, Fuse):
        return replace(rule, natives=tuple(moved(name) for name in rule.natives))
    return rule


def stages_shifted(patch: pytest.MonkeyPatch) -> None:
    """Each stage's layers are counted from one too far, the last becoming the first."""
    true = pieces.spelled

    def shifted(raw: str, tensor: Any) -> Any:
        found = true(raw, tensor)
        return found if found.layer is None else replace(found, layer=1 - found.layer)

    patch.setattr(pieces, "spelled", shifted)


@dataclass(frozen=True)
class Backwards(Cut):
    """Ranks joined from the last to the first."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return super().join(list(parts)[::-1])

    def piece(self, whole: Tensor, rank: int, size: int) -> Tensor:
        return super().piece(whole, size - 1 - rank, size)


def untrimmed(patch: pytest.MonkeyPatch) -> None:
    """Padding taken for ids."""
    true = open_checkpoint.model_config

    def changed(args: Any, where: str, *, rows: int, **kind: Any) -> ModelConfig:
        return replace(true(args, where, rows=rows, **kind), vocab_size=rows)

    patch.setattr(open_checkpoint, "model_config", changed)


def version_ignored(patch: pytest.MonkeyPatch) -> None:
    """Rows of any version read as those of version 3."""
    patch.setattr(pieces, "to_groups", lambda rows, version, heads: rows)


def reversed_experts(count: int) -> Tensor:
    return torch.arange(count).flip(0)


def shifted(count: int) -> Tensor:
    return torch.arange(count).roll(1)


def gate_first(rule: Rule) -> Rule:
    """Of the MLP's two halves, the second first."""
    if isinstance(rule, Fuse) and len(rule.natives) == 2:
        return replace(rule, natives=rule.natives[::-1])
    return rule


# Model (of test_mutations) and fault; made in both directions.
BOTH_WAYS: dict[str, tuple[str, Fault]] = {
    "qkv in the order of version 0": ("llama", qkv(PlainQKV)),
    "qkv in the order of version 1": ("gpt2", qkv(ChannelQKV)),
    "key and value swapped": ("llama", natives(GroupedQKV, (0, 2, 1))),
    "query and key swapped": ("gpt2", natives(GroupedQKV, (1, 0, 2))),
    "gate and up swapped": ("llama", table(gate_first)),
    "gate and up not interleaved by rank": ("llama", cuts("mlp.linear_fc1", Cut(0))),
    "ranks joined backwards": ("gpt2", cuts("linear_qkv", Backwards(0))),
    "vocabulary ranks joined backwards": ("llama", cuts("word_embeddings", Backwards(0))),
    "output ranks joined backwards": ("llama", cuts("output_layer", Backwards(0))),
    "layers off by one": ("gpt2", table(neighbour_layers)),
    "norms swapped": ("llama", renamed("attention_norm", "mlp_norm")),
    "final norm missing": ("llama", lost("final_norm.weight", 1.0)),
    "norm offset missing": ("gpt2", lost("mlp_norm.bias", 0.0)),
    "row bias missing": ("gpt2", lost("mlp.down.bias", 0.0)),
    "positions shifted": ("gpt2", permuted("embedding.positions.weight", shifted)),
    "embedding rows shifted": ("llama", one("embedding.tokens.weight", shifted_rows)),
    "experts in another order": ("mixtral", permuted("experts.down", reversed_experts)),
    "experts off by one": ("mixtral", permuted("experts.down", shifted)),
    "router rows off by one": ("mixtral", permuted("router.weight", shifted)),
    "gates and ups of experts swapped": ("mixtral", natives(StackedGateUp, (1, 0))),
    "gates of experts not interleaved": ("mixtral", cuts("experts.linear_fc1", Cut(1))),
    "norms of queries and keys swapped": ("qwen3", renamed("query_norm", "key_norm")),
    "biases of experts lost": ("deepseek", lost("router.expert_bias", 0.0)),
    "shared expert lost": ("deepseek", lost("shared.down.weight", 0.0)),
    "qkv of a BERT in the order of version 0": ("bert", qkv(PlainQKV)),
    "pooler and head swapped": ("bert", renamed("pooler.dense", "transform.dense")),
    "segments swapped": ("bert", permuted("embedding.types.weight", shifted)),
    "order swapped": ("bert", permuted("order.bias", shifted)),
    "output bias shifted": ("bert", one("output_bias", shifted_rows)),
    "output bias joined backwards": ("bert", cuts("lm_head.bias", Backwards(0))),
}
# Seen before anything is computed: shapes of pieces say along which dimension they were cut.
SQUARE_CUT_WRONG = cuts("linear_proj.weight", Cut(0))
READING: dict[str, tuple[str, Fault]] = {
    "padding not trimmed": ("gpt2", untrimmed),
    "stages' layers swapped": ("gpt2", stages_shifted),
    "activation wrong": ("gpt2", config(activation="gelu")),
    "epsilon wrong": ("llama", config(norm_epsilon=1e-2)),
    "rotary base wrong": ("llama", config(rotary_base=500.0)),
    "rotary share wrong": ("mixtral", config(rotary_percent=1.0)),
    "top experts wrong": ("mixtral", config(moe_router_topk=1)),
    "window off by one": ("qwen3", config(window_size=6)),
    "rope not scaled": ("llama3", config(rope_scaling_type=None)),
    "experts not in groups": (
        "deepseek",
        config(moe_router_num_groups=None, moe_router_group_topk=None),
    ),
    "weights of experts not scaled": ("deepseek", config(moe_router_topk_scaling_factor=None)),
    "gelu of the head wrong": ("bert", config(bert_head_activation=None)),
    "gelu of the MLPs wrong": ("bert", config(activation="gelu")),
}
WRITING: dict[str, tuple[str, Fault]] = {
    "activation wrong": ("gpt2", arguments(bias_gelu_fusion=False)),
    "epsilon wrong": ("llama", arguments(norm_epsilon=1e-2)),
    "rotary base wrong": ("llama", arguments(rotary_base=500)),
    "rotary share wrong": ("mixtral", arguments(rotary_percent=1.0)),
    "positions not rotated": (
        "llama",
        arguments(position_embedding_type="none", use_rotary_position_embeddings=False),
    ),
    "top experts wrong": ("mixtral", arguments(moe_router_topk=3)),
    "vocabulary wrong": ("gpt2", arguments(vocab_size=299)),
    "gelu of the MLPs wrong": ("bert", arguments("bert_arguments", bias_gelu_fusion=False)),
}
