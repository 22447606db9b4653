"""Faults in what one family does differently from others, and the list of all faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mtk.convert.mapping import FuseHeads, PairedRows, Rename, Rule
from tests.convert.faults import (
    GPT2_FAULTS,
    LLAMA_FAULTS,
    Fault,
    config_fault,
    fused,
    lost,
    next_layer,
    replaced,
    swapped,
    table_fault,
)


@dataclass(frozen=True)
class Added(Rename):
    """A constant more on the foreign side."""

    value: float

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (native[0] + self.value,)

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (foreign[0] - self.value,)


def rope_fault(written: dict[str, Any], read: dict[str, Any]) -> Fault:
    """rope_parameters say something else; nothing is said in the old spelling."""
    return config_fault({"rope_parameters": written, "rope_scaling": None}, read)


def order(*parts: int) -> Fault:
    """Query, key and value of each head in another order."""
    return fused(lambda rule: replace(rule, natives=tuple(rule.natives[p] for p in parts)))


def in_thirds(rule: Rule) -> Rule:
    """All query heads, then all key heads, then all value heads."""
    return replace(rule, head_size=rule.sizes[0]) if isinstance(rule, FuseHeads) else rule


def unpaired(rule: Rule) -> Rule:
    return Rename(rule.native, rule.foreign) if isinstance(rule, PairedRows) else rule


BASE = {"rope_theta": 10000.0}
SCALED = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **BASE}
UNSCALED: dict[str, Any] = {
    "rope_scaling_type": None,
    "rope_scaling_factor": 8.0,
    "rope_original_max_positions": None,
}
LLAMA3_FAULTS: dict[str, Fault] = {
    "rope unscaled": rope_fault({"rope_type": "default", **BASE}, UNSCALED),
    # What Megatron-LM does whatever --rope-scaling-factor says.
    "factor 8 for 32": rope_fault(
        {**SCALED, "factor": 8.0, "original_max_position_embeddings": 16},
        {"rope_scaling_factor": 8.0},
    ),
    "scaled from other positions": rope_fault(
        {**SCALED, "factor": 32.0, "original_max_position_embeddings": 8},
        {"rope_original_max_positions": 8},
    ),
    "interleaved rows left as they are": table_fault(unpaired),
}
MISTRAL_FAULTS: dict[str, Fault] = {
    "window one too wide": config_fault({"sliding_window": 6}, {"window_size": 6}),
    "window dropped": config_fault({"sliding_window": None}, {"window_size": None}),
    "gate and up swapped": swapped("mlp.gate", "mlp.up"),
}
QWEN2_FAULTS: dict[str, Fault] = {
    "query bias dropped": lost("query.bias", 0.0),
    "query and key biases of other layers": table_fault(next_layer),
}
QWEN3_FAULTS: dict[str, Fault] = {
    "norms of heads swapped": swapped("query_norm", "key_norm"),
    "norm of keys skipped": lost("key_norm.weight", 1.0),
}
GEMMA_FAULTS: dict[str, Fault] = {
    "norms around one": replaced("norm.weight", lambda rule: Added(rule.native, rule.foreign, 1.0)),
    "final norm skipped": lost("final_norm.weight", 0.0),
}
NEOX_FAULTS: dict[str, Fault] = {
    "heads in thirds": table_fault(in_thirds),
    "key before query": order(1, 0, 2),
    "value before key": order(0, 2, 1),
    "other residual": config_fault(
        {"use_parallel_residual": False}, {"use_parallel_residual": False}
    ),
    "whole heads rotated": config_fault(
        {
            "rotary_pct": 1.0,
            "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0, **BASE},
        },
        {"rotary_percent": 1.0},
    ),
}
BLOOM_FAULTS: dict[str, Fault] = {
    "embedding norm skipped": lost("embedding.norm.weight", 1.0),
    "heads in thirds": table_fault(in_thirds),
}
# Nothing but what is written is wrong: no file has interleaved rows.
WRITING_ONLY = ("output tied", "interleaved rows left as they are")
BY_MODEL = {
    "llama": LLAMA_FAULTS,
    "llama3": LLAMA3_FAULTS,
    "gpt2": GPT2_FAULTS,
    "mistral": MISTRAL_FAULTS,
    "qwen2": QWEN2_FAULTS,
    "qwen3": QWEN3_FAULTS,
    "gemma": GEMMA_FAULTS,
    "neox": NEOX_FAULTS,
    "bloom": BLOOM_FAULTS,
}
FAULTS = [
    (model, name, fault) for model, found in BY_MODEL.items() for name, fault in found.items()
]
