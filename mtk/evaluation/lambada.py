"""LAMBADA (Paperno et al. 2016): predict the last word of a passage.

Not strict: the label is the last token of the text. Strict: the label is every token of
the last word behind one space. A passage counts if all label tokens are the most likely
ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mtk.errors import DataError
from mtk.evaluation.documents import Document
from mtk.evaluation.perplexity import check_ids
from mtk.evaluation.scorer import Scorer
from mtk.evaluation.scoring import Request, Scored
from mtk.evaluation.text_ids import TextIds
from mtk.tokenizers import Tokenizer

DEFINITIONS = {
    "accuracy": "passages whose label tokens are all the most likely ones / passages",
    "loss": "mean over passages of -ln p of all label tokens",
    "perplexity": "exp(loss)",
    "strict": "label is the last word; otherwise the last token",
    "truncated": "passages longer than the context, whose beginning was left out",
}


@dataclass(frozen=True)
class LambadaResult:
    figures: dict[str, Any]
    items: list[dict[str, Any]]


def lambada(
    scorer: Scorer,
    text: TextIds,
    documents: Sequence[Document],
    *,
    strict: bool,
    seq_length: int,
    advance: Callable[[int], None] = lambda count: None,
) -> LambadaResult:
    """Score every passage; of one that is too long the beginning is left out.

    Raises DataError for one that is too short, or whose label alone exceeds the context.
    """
    whole = [passage_request(text, document, strict=strict) for document in documents]
    for request, document in zip(whole, documents, strict=True):
        check_ids(list(request.tokens), scorer.model, document.origin)
    requests = [
        _fitting(request, document, seq_length)
        for request, document in zip(whole, documents, strict=True)
    ]
    found = scorer.score(requests, advance)
    items = [
        _item(text.tokenizer, documents[n], requests[n], found[n], whole[n].first)
        for n in range(len(documents))
    ]
    correct = sum(item["correct"] for item in items)
    loss = -math.fsum(item["log_likelihood"] for item in items) / len(items)
    figures = {
        "accuracy": correct / len(items),
        "correct": correct,
        "total": len(items),
        "loss": loss,
        "perplexity": math.exp(min(700.0, loss)),
        "strict": strict,
        "truncated": sum(item["truncated"] > 0 for item in items),
    }
    return LambadaResult(figures, items)


def passage_request(text: TextIds, document: Document, *, strict: bool) -> Request:
    """The passage as ids, its label scored.

    The ids of the last word are what the passage with it has more than without it, as in
    lm-evaluation-harness: some tokenizers put a space before every text, so that the word alone
    would get a token that never stands there. Raises DataError for a passage of one word.
    """
    front = len(text.front)
    if not strict:
        tokens = text.whole(document.text, document.origin)
        first = len(tokens) - 1
    else:
        word = document.text.split()[-1]
        before = document.text[: document.text.rindex(word)].strip()
        context = text.whole(before, document.origin)
        whole = text.whole(f"{before} {word}", document.origin)
        tokens = context + whole[len(context) :]
        first = len(context)
    if first < 1 + front or first == len(tokens):
        raise DataError(f"{document.origin} is too short: nothing stands before its last word.")
    return Request(tokens, first)


def _fitting(request: Request, document: Document, seq_length: int) -> Request:
    excess = request.inputs - seq_length
    if excess <= 0:
        return request
    if excess >= request.first:
        raise DataError(
            f"{document.origin}: its last word has {len(request.tokens) - request.first} tokens, "
            f"more than the context of {seq_length}. Raise --seq-length, or leave the line out."
        )
    return Request(request.tokens[excess:], request.first - excess)


def _item(
    tokenizer: Tokenizer, document: Document, request: Request, scored: Scored, context: int
) -> dict[str, Any]:
    return {
        "origin": document.label,
        "label": tokenizer.decode([int(token) for token in request.tokens[request.first :]]),
        "predicted": tokenizer.decode(scored.predicted),
        "correct": all(scored.greedy),
        "log_likelihood": math.fsum(scored.log_probs),
        "context_tokens": request.first,
        "truncated": context - request.first,
        "label_tokens": len(request.tokens) - request.first,
    }
