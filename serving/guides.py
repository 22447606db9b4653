"""What a client may put between the model's logits and the choice of a token.

A bias on single tokens, penalties on what was said already, a grammar: all change logits before
temperature and filters; reported log-probabilities stay those of the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mtk.errors import ServingError

# OpenAI's ranges.
MAX_BIAS, MAX_REPEAT_PENALTY = 100.0, 2.0


class Matcher(Protocol):
    """One sequence's place in a grammar."""

    def allowed(self) -> Tensor:
        """Bool [V] on the CPU: tokens that may come next. Never all False."""

    def accept(self, token: int) -> None: ...


class Grammar(Protocol):
    """A compiled grammar. source: its text, for engines that compile it themselves."""

    source: str

    def begin(self) -> Matcher: ...


@dataclass(frozen=True, kw_only=True)
class Guide:
    """What is done to the logits of every sequence of a request.

    logit_bias: (token, what is added to its logit). presence_penalty: taken once from tokens
    that were generated already; frequency_penalty: taken for each time they were.
    """

    logit_bias: tuple[tuple[int, float], ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        """Raises ServingError (400) that names the field and its range."""
        for name in ("presence_penalty", "frequency_penalty"):
            # Written so that NaN violates too.
            if not abs(getattr(self, name)) <= MAX_REPEAT_PENALTY:
                rule = f"must lie in [-{MAX_REPEAT_PENALTY:g}, {MAX_REPEAT_PENALTY:g}]"
                raise ServingError(f"{name} = {getattr(self, name)!r}: {rule}", param=name)
        if any(not abs(value) <= MAX_BIAS for _, value in self.logit_bias):
            rule = f"values must lie in [-{MAX_BIAS:g}, {MAX_BIAS:g}]"
            raise ServingError(f"logit_bias: {rule}", param="logit_bias")

    def begin(self) -> TokenGuide:
        """The state of one sequence."""
        return TokenGuide(self)


class TokenGuide:
    """A guide at work on one sequence."""

    def __init__(self, guide: Guide) -> None:
        self._guide = guide
        self._matcher = guide.grammar.begin() if guide.grammar is not None else None
        self._counts: Counter[int] = Counter()

    def apply(self, logits_V: Tensor) -> Tensor:
        """Changed logits in fp32; the given ones stay as they are."""
        logits_V = logits_V.float().clone()
        if self._guide.logit_bias:
            _add(logits_V, self._guide.logit_bias)
        if self._counts and (self._guide.presence_penalty or self._guide.frequency_penalty):
            once, each = self._guide.presence_penalty, self._guide.frequency_penalty
            _add(logits_V, [(t, -once - each * n) for t, n in self._counts.items()])
        if self._matcher is not None:
            allowed_V = self._matcher.allowed().to(logits_V.device)
            logits_V[: len(allowed_V)].masked_fill_(~allowed_V, float("-inf"))
            logits_V[len(allowed_V) :] = float("-inf")
        return logits_V

    def accept(self, token: int) -> None:
        """``token`` was chosen."""
        self._counts[token] += 1
        if self._matcher is not None:
            self._matcher.accept(token)


def _add(logits_V: Tensor, changes: Sequence[tuple[int, float]]) -> None:
    # A tokenizer may have ids that the model cannot choose.
    known = [(token, value) for token, value in changes if token < len(logits_V)]
    if known:
        ids, values = zip(*known, strict=True)
        index = torch.tensor(ids, device=logits_V.device)
        logits_V[index] += torch.tensor(values, dtype=logits_V.dtype, device=logits_V.device)
