"""Perplexity as Megatron-LM reports it on WikiText-103, and per word and byte.

Perplexity per token depends on the tokenizer. The adjusted one spreads the same loss over
the words of the original file, so that models with different tokenizers can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mtk.errors import DataError
from mtk.evaluation.detokenizers import Detokenizer, detokenize
from mtk.evaluation.documents import Document
from mtk.evaluation.scorer import Scorer
from mtk.evaluation.scoring import Request
from mtk.evaluation.text_ids import TextIds
from mtk.evaluation.windows import Window, rolling, windows
from mtk.models.gpt import GPT

Advance = Callable[[int], None]
Cut = Literal["megatron", "rolling"]

# Documents of about this many tokens are tokenised and scored together.
TOKENS_AT_ONCE = 2**22

DEFINITIONS = {
    "tokens": "T: ids of the detokenised text, without BOS or EOD; summed over the D documents",
    "original_tokens": "N0: pieces between single spaces of the stripped text as it is in the file",
    "scored_tokens": "P: T - D, since the first token of a document has nothing in front; T where "
    "BOS stands there, or with rolling windows",
    "loss": "total of -ln p / P",
    "perplexity": "exp(min(20, loss))",
    "token_ratio": "P / (N0 - (T - P))",
    "adjusted_perplexity": "exp(min(20, loss x token_ratio)), per original token",
    "word_perplexity": "exp(total / words), words: pieces of the file between white space, empty "
    "ones at its ends included, as lm-evaluation-harness counts",
    "bits_per_byte": "total / ln 2 / bytes, bytes: UTF-8 of the text as it is in the file",
}


@dataclass(frozen=True)
class Settings:
    """seq_length: predictions in a window. overlap: see :func:`windows`. cut: ``rolling`` cuts
    as lm-evaluation-harness does and predicts the first token too, from BOS or the end of a
    document. detokenizer: the rules undone first."""

    seq_length: int
    overlap: int | None = None
    detokenizer: Detokenizer = "none"
    cut: Cut = "megatron"


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
    scorer: Scorer,
    text: TextIds,
    documents: Sequence[Document],
    settings: Settings,
    advance: Advance = lambda count: None,
) -> PerplexityResult:
    """Score every document by itself. Raises DataError if one has nothing to predict."""
    sums = _Sums()
    for first, chunk in _chunks(scorer.model, text, documents, settings):
        scores = token_windows(scorer, [ids for ids, _ in chunk], settings, advance)
        for number, ((_, tokens), entries) in enumerate(zip(chunk, scores, strict=True), first):
            document = documents[number]
            sums.tokens += tokens
            sums.original += len(document.text.strip().split(" "))
            sums.words += _words(document.text)
            sums.text_bytes += len(document.text.encode())
            for entry in entries:
                sums.nll -= entry["log_likelihood"]
                sums.scored += entry["scored"]
                sums.items.append({"document": number, "origin": document.label, **entry})
    return PerplexityResult(_figures(sums, len(documents)), sums.items)


def _chunks(
    model: GPT, text: TextIds, documents: Sequence[Document], settings: Settings
) -> Iterator[tuple[int, list[tuple[list[int], int]]]]:
    """Number of the first document, and (ids, tokens of the text itself) of some documents."""
    chunk: list[tuple[list[int], int]] = []
    first = held = 0
    for number, document in enumerate(documents):
        ids = text.whole(detokenize(document.text, settings.detokenizer), document.origin)
        tokens = len(ids) - len(text.front)
        if settings.cut == "rolling":
            ids = [text.anchor, *ids]
            tokens = len(ids) - 1
        check_ids(ids, model, document.origin)
        if len(ids) < 2:
            raise DataError(
                f"{document.origin} has {len(ids)} tokens; two are needed to predict one."
            )
        chunk.append((ids, tokens))
        held += len(ids)
        if held >= TOKENS_AT_ONCE:
            yield first, chunk
            chunk, first, held = [], number + 1, 0
    if chunk:
        yield first, chunk


def token_windows(
    scorer: Scorer,
    sequences: Sequence[Sequence[int]],
    settings: Settings,
    advance: Advance = lambda count: None,
) -> list[list[dict[str, Any]]]:
    """For each token sequence the log-likelihood of each of its windows, in order.

    start: number of the first scored prediction; prediction p is of token p + 1. advance: told
    the tokens scored.
    """
    cuts = [_cut(len(tokens) - 1, settings) for tokens in sequences]
    requests = [
        Request(array[w.start : w.start + w.length + 1], w.first + 1)
        for array, cut in zip(map(np.asarray, sequences), cuts, strict=True)
        for w in cut
    ]
    mean = sum(len(tokens) - 1 for tokens in sequences) / max(1, len(requests))
    found = iter(scorer.score(requests, lambda count: advance(round(count * mean))))
    return [[_entry(window, math.fsum(next(found).log_probs)) for window in cut] for cut in cuts]


def _cut(targets: int, settings: Settings) -> list[Window]:
    if settings.cut == "rolling":
        return list(rolling(targets, settings.seq_length))
    return list(windows(targets, settings.seq_length, settings.overlap))


def _entry(window: Window, log_likelihood: float) -> dict[str, Any]:
    start = window.start + window.first
    return {"start": start, "scored": window.scored, "log_likelihood": log_likelihood}


def _words(text: str) -> int:
    outer = (text[:1].isspace(), text[-1:].isspace())
    return len(text.split()) + sum(outer)


def _figures(sums: _Sums, documents: int) -> dict[str, Any]:
    loss = sums.nll / sums.scored
    words = sums.original - (sums.tokens - sums.scored)
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
