"""Which engine encodes a corpus: the fastest one whose ids are proven, or the one asked for."""

from __future__ import annotations

from mtk.errors import ConfigError, Problem
from mtk.tokenizers.base import Tokenizer
from mtk.tokenizers.fastokens_engine import NAME as FASTOKENS
from mtk.tokenizers.fastokens_engine import fastokens_encoder, is_installed
from mtk.tokenizers.flat import REFERENCE, FlatEncoder, ReferenceEncoder
from mtk.tokenizers.word_cache import NAME as WORDS
from mtk.tokenizers.word_cache import word_cache_encoder

AUTO = "auto"


def choose_engine(tokenizer: Tokenizer, wanted: str = AUTO) -> FlatEncoder:
    """The encoder for ``tokenizer``. Raises ConfigError if ``wanted`` cannot serve it."""
    found: FlatEncoder | None = None
    if wanted in (AUTO, FASTOKENS):
        found = fastokens_encoder(tokenizer)
    if found is None and wanted in (AUTO, WORDS):
        found = word_cache_encoder(tokenizer)
    if found is None and wanted in (AUTO, REFERENCE):
        found = ReferenceEncoder(tokenizer)
    if found is None:
        missing = wanted == FASTOKENS and not is_installed()
        rule = (
            "needs the package fastokens: pip install 'mtk[fast]'"
            if missing
            else f"is not proven to give the ids of this {tokenizer.kind}"
        )
        raise ConfigError([Problem("tokenizer_engine", wanted, rule, "Nearest: auto.")])
    return found
