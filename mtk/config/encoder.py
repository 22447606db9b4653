"""Options of models with an encoder (BERT, T5) and their rules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mtk.config.heads import TASKS
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
    bert_head_activation: Literal["gelu", "gelu-tanh", "relu", "squared-relu"] | None = option(
        None,
        help="BERT: non-linearity before the output matrix (default: as activation). Megatron's "
        "has gelu there even where its MLPs have gelu-tanh.",
    )
    task_head: Literal["RACE", "MNLI", "QQP"] | None = option(
        None, help="BERT: head of a task, in place of those of pretraining.", hidden=True
    )
    num_classes: int | None = option(
        None, help="BERT: labels that the head of the task tells apart.", hidden=True
    )
    decoder_seq_length: int = option(128, help="T5: tokens of the decoder per training sample.")
    decoder_start_token_id: int | None = option(
        None,
        help="T5: id that the decoder begins with (default: BOS of the tokenizer, else PAD).",
        hidden=True,
    )
    softmax_scale: float | None = option(
        None, help="T5: factor on attention scores (default: 1 / sqrt(head); published T5: 1)."
    )
    scale_tied_output: bool = option(
        False, help="T5: states are divided by sqrt(hidden-size) before the tied output matrix."
    )


OPTIONS = {
    "bert": (
        "norm_placement",
        "num_tokentypes",
        "bert_binary_head",
        "bert_head_activation",
        "task_head",
        "num_classes",
    ),
    "t5": ("decoder_seq_length", "decoder_start_token_id", "softmax_scale", "scale_tied_output"),
}


def encoder_problems(model: ModelConfig) -> Iterator[Problem]:
    """Violations of the rules of BERT and T5, and of their options elsewhere."""
    for family, names in OPTIONS.items():
        for name in names if model.family != family else ():
            if getattr(model, name) != EncoderOptions.__dataclass_fields__[name].default:
                rule = f"only means something with family = {family}"
                yield Problem(name, getattr(model, name), rule, "Leave it out.")
    if model.family == "bert":
        yield from _bert(model)
    if model.family == "t5":
        yield from _t5(model)


def _t5(model: ModelConfig) -> Iterator[Problem]:
    decoded, kind = model.decoder_seq_length, model.position_embedding_type
    if decoded < 1:
        yield Problem("decoder_seq_length", decoded, "must be at least 1", "Nearest: 128.")
    elif kind == "learned" and decoded > model.positions:
        rule = f"exceeds max_position_embeddings = {model.positions}"
        yield Problem("decoder_seq_length", decoded, rule, f"Nearest: {model.positions}.")
    if kind not in ("learned", "relative", "none"):
        rule = "is not what family t5 has"
        yield Problem("position_embedding_type", kind, rule, "Nearest: relative.")
    start, vocab = model.decoder_start_token_id, model.vocab_size
    if start is not None and not 0 <= start < (start + 1 if vocab is None else vocab):
        rule = f"ids lie in 0..{vocab - 1}" if vocab else "must not be negative"
        yield Problem("decoder_start_token_id", start, rule, "Published T5: 0.")
    scale = model.softmax_scale
    if scale is not None and not 0 < scale < math.inf:
        rule = "must be greater than 0 and finite"
        yield Problem("softmax_scale", scale, rule, "Published T5: 1.0.")
    if model.scale_tied_output and model.untie_embeddings_and_output_weights:
        rule = "belongs to a tied output matrix"
        yield Problem("scale_tied_output", True, rule, "Leave it out.")


def _bert(model: ModelConfig) -> Iterator[Problem]:
    head, classes = model.task_head, model.num_classes
    if head is None and classes is not None:
        yield Problem("num_classes", classes, "belongs to task_head", "Leave it out.")
    if head is not None and classes not in (None, TASKS[head].classes):
        rule = f"{head} has {TASKS[head].classes} classes"
        yield Problem("num_classes", classes, rule, f"Nearest: {TASKS[head].classes}.")
    if head is not None and model.bert_binary_head:
        rule = "the head of a task stands in the place of those of pretraining"
        yield Problem("bert_binary_head", True, rule, "Nearest: False.")
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
