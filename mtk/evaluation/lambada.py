"""LAMBADA (Paperno et al. 2016): predict the last word of a passage.

Not strict: the label is the last token of the text. Strict: the label is every token of
the last word, and the passage in front of it is tokenised on its own. A passage counts
if all label tokens are the most likely ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mtk.errors import DataError
from mtk.evaluation.documents import Document
from mtk.evaluation.perplexity import check_ids
from mtk.evaluation.scoring import Request, Scored, batches, score
from mtk.models.gpt import GPT
from mtk.tokenizers import Tokenizer

DEFINITIONS = {
    "accuracy": "passages whose label tokens are all the most likely ones / passages",
    "loss": "mean over passages of -ln p of all label tokens",
    "perplexity": "exp(min(20, loss))",
    "strict": "label is the last word; otherwise the last token",
}


@dataclass(frozen=True)
class LambadaResult:
    figures: dict[str, Any]
    items: list[dict[str, Any]]


def lambada(
    model: GPT,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    strict: bool,
    seq_length: int,
    batch_size: int | None = None,
    token_budget: int = 16_384,
    advance: Callable[[int], None] = lambda count: None,
) -> LambadaResult:
    """Score every passage. Raises DataError for one that is too short or too long."""
    requests = [_request(tokenizer, document, strict) for document in documents]
    for request, document in zip(requests, documents, strict=True):
        check_ids(request.tokens, model, document.origin)
        if request.inputs > seq_length:
            raise DataError(
                f"{document.origin} has {len(request.tokens)} tokens, of which {seq_length} + 1 "
                f"fit. Raise --seq-length (the model takes {model.config.positions}), or shorten "
                f"the line."
            )
    found: dict[int, Scored] = {}
    budget = token_budget if batch_size is None else 2**62
    for group in batches(requests, batch_size or len(requests), budget):
        results = score(model, [requests[i] for i in group], tokenizer.eod)
        found.update(zip(group, results, strict=True))
        advance(len(group))
    items = [
        _item(tokenizer, document, request, found[index])
        for index, (document, request) in enumerate(zip(documents, requests, strict=True))
    ]
    correct = sum(item["correct"] for item in items)
    loss = -math.fsum(item["log_prob"] for item in items) / len(items)
    figures = {
        "accuracy": correct / len(items),
        "correct": correct,
        "total": len(items),
        "loss": loss,
        "perplexity": math.exp(min(20.0, loss)),
        "strict": strict,
    }
    return LambadaResult(figures, items)


def _request(tokenizer: Tokenizer, document: Document, strict: bool) -> Request:
    text = document.text
    if not strict:
        tokens = tokenizer.encode(text)
        first = len(tokens) - 1
    else:
        word = text.split()[-1]
        context = tokenizer.encode(text[: text.rindex(word)].strip())
        tokens = context + tokenizer.encode(f" {word}")
        first = len(context)
    if first < 1 or first == len(tokens):
        raise DataError(f"{document.origin} is too short: nothing stands before its last word.")
    return Request(tokens, first)


def _item(
    tokenizer: Tokenizer, document: Document, request: Request, scored: Scored
) -> dict[str, Any]:
    return {
        "origin": document.label,
        "label": tokenizer.decode(list(request.tokens[request.first :])),
        "predicted": tokenizer.decode(scored.predicted),
        "correct": all(scored.greedy),
        "log_prob": math.fsum(scored.log_probs),
        "context_tokens": request.first,
        "label_tokens": len(request.tokens) - request.first,
    }
