"""Options of masked training data (BERT, T5) and their rules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtk.config.schema import option
from mtk.errors import Problem

if TYPE_CHECKING:
    from mtk.config.model import ModelConfig
    from mtk.config.pretrain import DataConfig

SPECIAL_TOKENS = {"bert": 3, "t5": 2}  # of a sample, beside the text
SHORTEST_TEXT = 2


@dataclass(frozen=True, kw_only=True)
class MaskingOptions:
    """Part of :class:`mtk.config.pretrain.DataConfig`."""

    mask_prob: float = option(0.15, help="BERT, T5: share of tokens that are masked.")
    short_seq_prob: float = option(
        0.1, help="BERT, T5: share of samples made shorter on purpose (rounded to 1/n)."
    )


MASKING_OPTIONS = ("mask_prob", "short_seq_prob")
WINDOW_OPTIONS = ("eod_mask_loss", "reset_attention_mask", "reset_position_ids")


def masking_problems(data: DataConfig, model: ModelConfig) -> Iterator[Problem]:
    """Violations of the rules of masked data, and data options that the family has no use for."""
    masked = model.family in SPECIAL_TOKENS
    unused = WINDOW_OPTIONS if masked else MASKING_OPTIONS
    for name in unused:
        if getattr(data, name) != type(data).__dataclass_fields__[name].default:
            rule = f"has no meaning for family = {model.family}"
            yield Problem(f"data.{name}", getattr(data, name), rule, "Leave it out.")
    if not masked:
        return
    if not 0 < data.mask_prob < 1:
        rule = "must lie between 0 and 1"
        yield Problem("data.mask_prob", data.mask_prob, rule, "Nearest: 0.15 is usual.")
    if not 0 <= data.short_seq_prob <= 1:
        rule = "must lie in 0..1"
        yield Problem("data.short_seq_prob", data.short_seq_prob, rule, "Nearest: 0.1 is usual.")
    least = SPECIAL_TOKENS[model.family] + SHORTEST_TEXT
    if model.seq_length < least:
        rule = f"must be at least {least}: special tokens and {SHORTEST_TEXT} of text"
        yield Problem("model.seq_length", model.seq_length, rule, f"Nearest: {least}.")
    elif model.family == "t5" and 0 < data.mask_prob < 1:
        yield from _decoder_problems(data, model)


def _decoder_problems(data: DataConfig, model: ModelConfig) -> Iterator[Problem]:
    """A decoder that would often be too short for what was masked: half as many spans as masked
    tokens are rarely exceeded."""
    text = model.seq_length - SPECIAL_TOKENS["t5"]
    least = 1 + math.ceil(1.5 * max(1, int(data.mask_prob * text)))
    found = model.decoder_seq_length
    if found < least:
        rule = f"must be at least {least} for seq_length = {model.seq_length} and "
        rule += f"mask_prob = {data.mask_prob}"
        yield Problem("model.decoder_seq_length", found, rule, f"Nearest: {least}.")
