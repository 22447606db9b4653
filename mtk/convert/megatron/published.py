"""Published checkpoints that carry no arguments: what their authors say about them.

Megatron kept no arguments in its files before version 2; sizes follow from the weights, but
neither the number of heads nor the activation does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A checkpoint by the sizes its weights show, and the arguments these do not show."""

    name: str
    num_layers: int
    hidden_size: int
    max_position_embeddings: int
    padded_vocab_size: int
    arguments: Mapping[str, object]


PUBLISHED = (
    # bias_gelu_fusion stands for its tanh approximation of gelu, which it always had.
    Published(
        "GPT-345M",
        num_layers=24,
        hidden_size=1024,
        max_position_embeddings=1024,
        padded_vocab_size=50304,
        arguments={
            "num_attention_heads": 16,
            "bias_gelu_fusion": True,
            "true_vocab_size": 50257,
        },
    ),
    # Megatron itself computes the MLPs of these two with its fused gelu unless it is told not to.
    # Ids are those of the vocabularies they were published with.
    Published(
        "BERT-345M-cased",
        num_layers=24,
        hidden_size=1024,
        max_position_embeddings=512,
        padded_vocab_size=29056,
        arguments={
            "num_attention_heads": 16,
            "bias_gelu_fusion": True,
            "true_vocab_size": 28996,
        },
    ),
    Published(
        "BERT-345M-uncased",
        num_layers=24,
        hidden_size=1024,
        max_position_embeddings=512,
        padded_vocab_size=30592,
        arguments={
            "num_attention_heads": 16,
            "bias_gelu_fusion": True,
            "true_vocab_size": 30522,
        },
    ),
)


def published_arguments(sizes: Mapping[str, int]) -> Mapping[str, object]:
    """What is known beyond ``sizes`` (by names of arguments); empty for other models."""
    for entry in PUBLISHED:
        named = ("num_layers", "hidden_size", "max_position_embeddings", "padded_vocab_size")
        if all(sizes.get(name) == getattr(entry, name) for name in named):
            return entry.arguments
    return {}
