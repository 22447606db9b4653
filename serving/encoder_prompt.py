"""How prompts enter a model whose encoder reads them (T5), and what such a model cannot be asked.

The prompt is no part of what the decoder writes: it has a length limit of its own, no
log-probabilities, and what is generated begins a text of its own.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from mtk.config.model import ModelConfig
from mtk.errors import ConfigError, Problem, ServingError
from mtk.tokenizers import Tokenizer

# Told as ``code`` of the error where a request has no meaning for such a model.
CODE = "not_for_encoder_decoder"


@dataclass(frozen=True)
class EncoderPrompt:
    """start: id that the decoder begins with. context: most tokens of a prompt."""

    start: int
    context: int


def has_encoder(config: ModelConfig) -> bool:
    """Whether prompts are read by an encoder and the decoder begins a text of its own."""
    return config.family == "t5"


def decoder_start(config: ModelConfig, tokenizer: Tokenizer) -> int:
    """The model's own, else the tokenizer's. Raises ConfigError where neither has one."""
    own = config.decoder_start_token_id
    start = tokenizer.decoder_start if own is None else own
    if start is None:
        rule = "the decoder begins with BOS or PAD, and the model's tokenizer has neither"
        raise ConfigError([Problem("load", tokenizer.kind, rule)])
    return start


def encoder_prompt(
    config: ModelConfig, tokenizer: Tokenizer, asked: int | None
) -> EncoderPrompt | None:
    """asked: most tokens of a prompt (default: the model's positions). None for a model that
    continues its prompts."""
    if not has_encoder(config):
        return None
    return EncoderPrompt(decoder_start(config, tokenizer), asked or config.positions)


def unlimited_prompt(config: ModelConfig, tokenizer: Tokenizer) -> EncoderPrompt | None:
    """Without limits but the model's positions; None for a model that continues its prompts."""
    if not has_encoder(config):
        return None
    context = config.positions if config.positions_are_limited else sys.maxsize
    return EncoderPrompt(decoder_start(config, tokenizer), context)


def end_tokens(tokenizer: Tokenizer, encoder: EncoderPrompt | None) -> frozenset[int]:
    """What ends a text: the end of a document, and what decoders behind an encoder are taught to
    end with, which in some vocabularies is another token."""
    ends = (tokenizer.eod,) if encoder is None else (tokenizer.eod, tokenizer.eos)
    return frozenset(token for token in ends if token is not None)


def refuse_for_encoder(encoder: EncoderPrompt | None, param: str, what: str) -> None:
    """Raises ServingError (400) with :data:`CODE` if prompts go through an encoder. what: was
    asked of the prompt, and means nothing there."""
    if encoder is not None:
        raise ServingError(
            f"{param}: {what}, which a model with an encoder has not: its decoder does not predict "
            f"the prompt. Leave {param} out.",
            param=param,
            code=CODE,
        )
