"""Options of models with an encoder (BERT, T5) and their rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mtk.config.schema import option
from mtk.errors import Problem

if TYPE_CHECKING:
    from mtk.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """Part of :class:`mtk.config.model.ModelConfig`."""

    norm_placement: Literal["pre", "post"] = option(
        "pre",
        help="BERT: norms before attention and MLP and at the end (pre, Megatron's BERT), or "
        "after them and after the embedding (post, the first BERT).",
    )
    num_tokentypes: int = option(2, help="BERT: kinds of segments that are told apart.")
    bert_binary_head: bool = option(
        True,
        help="BERT: pooler and head that tell whether two segments are in order.",
        shortcuts=(("--bert-no-binary-head", False),),
    )


BERT_OPTIONS = ("norm_placement", "num_tokentypes", "bert_binary_head")


def encoder_problems(model: ModelConfig) -> Iterator[Problem]:
    """Violations of the rules of BERT, and of its options elsewhere."""
    if model.family != "bert":
        for name in BERT_OPTIONS:
            if getattr(model, name) != EncoderOptions.__dataclass_fields__[name].default:
                rule = "only means something with family = bert"
                yield Problem(name, getattr(model, name), rule, "Leave it out.")
        return
    if model.num_tokentypes < 1:
        yield Problem("num_tokentypes", model.num_tokentypes, "must be at least 1", "Nearest: 2.")
    for name, wanted in (
        ("position_embedding_type", "learned"),
        ("normalization", "LayerNorm"),
        ("add_bias_linear", True),
        ("untie_embeddings_and_output_weights", False),
    ):
        if getattr(model, name) != wanted:
            rule = "is not what family bert has"
            yield Problem(name, getattr(model, name), rule, f"Nearest: {wanted}.")
