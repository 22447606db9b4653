"""Perplexity as Megatron-LM reports it on WikiText-103, and per word and byte.

Perplexity per token depends on the tokenizer. The adjusted one spreads the same loss over
the words of the original file, so that models with different tokenizers can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mtk.errors import DataError
from mtk.evaluation.detokenizers import Detokenizer, detokenize
from mtk.evaluation.documents import Document
from mtk.evaluation.scoring import Request, batches, score
from mtk.evaluation.windows import Window, windows
from mtk.models.gpt import GPT
from mtk.tokenizers import Tokenizer

Advance = Callable[[int], None]

DEFINITIONS = {
    "tokens": "T: ids of the detokenised text, no BOS or EOD added; summed over the D documents",
    "original_tokens": "N0: pieces between single spaces of the stripped text as it is in the file",
    "loss": "total of -ln p / (T - D); the first token of a document is not predicted",
    "perplexity": "exp(min(20, loss))",
    "token_ratio": "(T - D) / (N0 - D)",
    "adjusted_perplexity": "exp(min(20, loss x token_ratio)), per original token",
    "word_perplexity": "exp(total / words), words: pieces between any white space in the file",
    "bits_per_byte": "total / ln 2 / bytes, bytes: UTF-8 of the text as it is in the file",
}


@dataclass(frozen=True)
class Settings:
    """seq_length: predictions in a window. overlap: see :func:`windows`. batch_size: None
    fills a budget of tokens. detokenizer: the rules undone first."""

    seq_length: int
    overlap: int | None = None
    batch_size: int | None = None
    token_budget: int = 16_384
    detokenizer: Detokenizer = "none"


@dataclass
class _Sums:
    nll: float = 0.0
    tokens: int = 0
    scored: int = 0
    original: int = 0
    words: int = 0
    text_bytes: int = 0
    items: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class PerplexityResult:
    """figures: names as in DEFINITIONS. items: one line for each window."""

    figures: dict[str, Any]
    items: list[dict[str, Any]]


def perplexity(
    model: GPT,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    settings: Settings,
    advance: Advance = lambda count: None,
) -> PerplexityResult:
    """Score every document by itself. Raises DataError if none has two tokens."""
    sums = _Sums()
    for number, document in enumerate(documents):
        tokens = tokenizer.encode(detokenize(document.text, settings.detokenizer))
        check_ids(tokens, model, document.origin)
        if len(tokens) < 2:
            raise DataError(
                f"{document.origin} has {len(tokens)} tokens; two are needed to predict one."
            )
        sums.tokens += len(tokens)
        sums.original += len(document.text.strip().split(" "))
        sums.words += len(document.text.split())
        sums.text_bytes += len(document.text.encode())
        for entry in token_windows(model, tokens, settings, tokenizer.eod, advance):
            sums.nll += entry["nll"]
            sums.scored += entry["scored"]
            sums.items.append({"document": number, "origin": document.label, **entry})
    return PerplexityResult(_figures(sums, len(documents)), sums.items)


def token_windows(
    model: GPT,
    tokens: Sequence[int],
    settings: Settings,
    pad: int,
    advance: Advance = lambda count: None,
) -> list[dict[str, Any]]:
    """Negative log-likelihood of each window of one token sequence, in order."""
    cut = list(windows(len(tokens) - 1, settings.seq_length, settings.overlap))
    requests = [Request(tokens[w.start : w.start + w.length + 1], w.first + 1) for w in cut]
    found: dict[int, dict[str, Any]] = {}
    limit = settings.batch_size or len(requests)
    # A batch size that was asked for is kept whatever the budget.
    budget = settings.token_budget if settings.batch_size is None else 2**62
    for group in batches(requests, limit, budget):
        for index, result in zip(
            group, score(model, [requests[i] for i in group], pad), strict=True
        ):
            found[index] = _entry(cut[index], math.fsum(result.log_probs))
            advance(cut[index].scored)
    return [found[index] for index in range(len(cut))]


def _entry(window: Window, log_prob: float) -> dict[str, Any]:
    return {"start": window.start + window.first, "scored": window.scored, "nll": -log_prob}


def _figures(sums: _Sums, documents: int) -> dict[str, Any]:
    loss = sums.nll / sums.scored
    words = sums.original - documents
    ratio = sums.scored / words if words > 0 else None
    return {
        "loss": loss,
        "perplexity": math.exp(min(20.0, loss)),
        "adjusted_perplexity": None if ratio is None else math.exp(min(20.0, loss * ratio)),
        "token_ratio": ratio,
        "word_perplexity": math.exp(min(700.0, sums.nll / sums.words)),
        "bits_per_byte": sums.nll / math.log(2) / sums.text_bytes,
        "total_nll": sums.nll,
        "tokens": sums.tokens,
        "scored_tokens": sums.scored,
        "original_tokens": sums.original,
        "documents": documents,
        "words": sums.words,
        "bytes": sums.text_bytes,
    }


def check_ids(tokens: Sequence[int], model: GPT, origin: str) -> None:
    """Ids the model has no row for would read another token's, or fail deep inside."""
    limit = model.config.vocab_size or 0
    bad = next((token for token in tokens if not 0 <= token < limit), None)
    if bad is not None:
        raise DataError(
            f"{origin}: the tokenizer gives id {bad}, the model has {limit} ids. This is not the "
            f"tokenizer the model was trained with."
        )
