"""Seeded faults of a converter, each made in both directions at once where that is possible.

A fault changes the data that describe a family: its table of weights or its config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mtk.config.model import ModelConfig
from mtk.convert.family import Family, ForeignConfig
from mtk.convert.mapping import CutRows, Fuse, Rename, Rule, Transpose, WeightTable

Fault = Callable[[Family], Family]
HEAD = 8  # channels of a head in the test models


@dataclass(frozen=True)
class Permuted(Rename):
    """Rows in another order on the foreign side; the wrong order is undone on the way back."""

    order: Callable[[int], Tensor]

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (native[0][self.order(native[0].shape[0])],)

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (foreign[0][self.order(foreign[0].shape[0]).argsort()],)


@dataclass(frozen=True)
class Lost(Rename):
    """The tensor is replaced by a constant."""

    value: float

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (torch.full_like(native[0], self.value),)

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.to_foreign(foreign)


@dataclass(frozen=True)
class LastRows(CutRows):
    """Padding cut off at the wrong end."""

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (native[0][-self.rows :].contiguous(),)

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (torch.nn.functional.pad(foreign[0], (0, 0, self.padded - self.rows, 0)),)


@dataclass(frozen=True)
class ShiftedRows(CutRows):
    """Every id gets its neighbour's embedding."""

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (super().to_foreign(native)[0].roll(1, 0),)

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return super().to_native((foreign[0].roll(-1, 0),))


def table_fault(change: Callable[[Rule], Rule]) -> Fault:
    def fault(family: Family) -> Family:
        def weights(config: ModelConfig) -> WeightTable:
            table = family.weights(config)
            return replace(table, rules=tuple(change(rule) for rule in table.rules))

        return replace(family, weights=weights)

    return fault


def swapped(first: str, second: str) -> Fault:
    """Two native weights trade places wherever their names differ only in these parts."""

    def change(rule: Rule) -> Rule:
        if not isinstance(rule, Rename):
            return rule
        if first in rule.native:
            return replace(rule, native=rule.native.replace(first, second))
        return replace(rule, native=rule.native.replace(second, first))

    return table_fault(change)


def replaced(ending: str, make: Callable[[Rename], Rule]) -> Fault:
    """Rules of native weights with this ending are made anew."""

    def change(rule: Rule) -> Rule:
        return make(rule) if isinstance(rule, Rename) and rule.native.endswith(ending) else rule

    return table_fault(change)


def permuted(ending: str, order: Callable[[int], Tensor]) -> Fault:
    return replaced(ending, lambda rule: Permuted(rule.native, rule.foreign, order))


def lost(ending: str, value: float) -> Fault:
    return replaced(ending, lambda rule: Lost(rule.native, rule.foreign, value))


def fused(change: Callable[[Fuse], Fuse]) -> Fault:
    return table_fault(lambda rule: change(rule) if isinstance(rule, Fuse) else rule)


def config_fault(written: Mapping[str, Any], read: Mapping[str, Any]) -> Fault:
    """config.json states other values, and reading takes them for the right ones."""

    def fault(family: Family) -> Family:
        def to_config(config: ModelConfig) -> dict[str, Any]:
            return {**family.to_config(config), **written}

        def from_config(found: ForeignConfig) -> ModelConfig:
            return replace(family.from_config(found), **read)

        return replace(family, to_config=to_config, from_config=from_config)

    return fault


def next_layer(rule: Rule) -> Rule:
    """Layer 0 is written as layer 1 and the other way round."""
    if isinstance(rule, Rename) and rule.native.startswith("layers."):
        _, number, rest = rule.native.split(".", 2)
        return replace(rule, native=f"layers.{1 - int(number)}.{rest}")
    return rule


def interleaved(rows: int) -> Tensor:
    """The order of rows for pairs (2c, 2c + 1), as in Meta's own Llama files."""
    order = torch.arange(rows).view(-1, 2, HEAD // 2).transpose(1, 2)
    return order.reshape(-1)


def both(ending_a: str, ending_b: str, order: Callable[[int], Tensor]) -> Fault:
    return lambda family: permuted(ending_b, order)(permuted(ending_a, order)(family))


def reversed_heads(rows: int) -> Tensor:
    return torch.arange(rows).view(-1, HEAD).flip(0).reshape(-1)


def shifted(rows: int) -> Tensor:
    return torch.arange(rows).roll(1)


def recut(kind: type[CutRows]) -> Callable[[Rename], Rule]:
    def make(rule: Rename) -> Rule:
        assert isinstance(rule, CutRows)
        return kind(rule.native, rule.foreign, rule.rows, rule.padded)

    return make


LLAMA_FAULTS: dict[str, Fault] = {
    "query and key swapped": swapped("attention.query", "attention.key"),
    "key and value swapped": swapped("attention.key", "attention.value"),
    "square weight transposed": replaced(
        "attention.output.weight", lambda rule: Transpose(rule.native, rule.foreign)
    ),
    "gate and up swapped": swapped("mlp.gate", "mlp.up"),
    "norms swapped": swapped("attention_norm", "mlp_norm"),
    "norm skipped": lost("mlp_norm.weight", 1.0),
    "final norm skipped": lost("final_norm.weight", 1.0),
    "layers off by one": table_fault(next_layer),
    "rotary permuted": both("query.weight", "key.weight", interleaved),
    "query heads reversed": permuted("query.weight", reversed_heads),
    "value heads reversed": permuted("value.weight", reversed_heads),
    "embedding rows shifted": replaced("embedding.tokens.weight", recut(ShiftedRows)),
    "padding cut at the wrong end": replaced("embedding.tokens.weight", recut(LastRows)),
    "bias dropped": lost("value.bias", 0.0),
    "epsilon wrong": config_fault({"rms_norm_eps": 1e-3}, {"norm_epsilon": 1e-3}),
    "rotary base wrong": config_fault(
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rotary_base": 5e5},
    ),
    "output tied": config_fault({"tie_word_embeddings": True}, {}),
}
GPT2_FAULTS: dict[str, Fault] = {
    "query and key swapped": fused(
        lambda rule: replace(rule, natives=(rule.natives[1], rule.natives[0], rule.natives[2]))
    ),
    "key and value swapped": fused(
        lambda rule: replace(rule, natives=(rule.natives[0], rule.natives[2], rule.natives[1]))
    ),
    "square weight transposed": replaced(
        "attention.output.weight", lambda rule: Rename(rule.native, rule.foreign)
    ),
    "norms swapped": swapped("attention_norm", "mlp_norm"),
    "norm offset dropped": lost("attention_norm.bias", 0.0),
    "bias dropped": lost("mlp.up.bias", 0.0),
    "positions shifted": permuted("embedding.positions.weight", shifted),
    "layers off by one": table_fault(next_layer),
    "activation wrong": config_fault({"activation_function": "gelu"}, {"activation": "gelu"}),
    "epsilon wrong": config_fault({"layer_norm_epsilon": 1e-3}, {"norm_epsilon": 1e-3}),
}
