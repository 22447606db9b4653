"""How the next token is chosen: greedy, temperature, top-k, top-p, seeds.

Shape suffix: V vocabulary.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mtk.errors import ServingError

MAX_TEMPERATURE, MAX_TOP_K, MAX_TOP_LOGPROBS = 100.0, 1000, 20
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's choices.

    temperature: 0 is greedy. top_k: 0 is off, 1 is greedy. top_p: 0 or 1 is off; the first
    token that passes the threshold is kept (Holtzman et al. 2020). top_p_decay, top_p_bound:
    after each token top_p is multiplied by the one and kept above the other; 0 is off
    (Lee et al. 2022). seed: None draws a fresh one. logprobs: None is none, 0 the chosen
    tokens', N those of the N likeliest tokens as well.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    top_p_decay: float = 0.0
    top_p_bound: float = 0.0
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Raises ServingError (400) that names the field and its range."""
        for param, found, rule in self._violations():
            raise ServingError(f"{param} = {found!r}: {rule}", param=param)

    def _violations(self) -> Iterator[tuple[str, object, str]]:
        # Written so that NaN violates too.
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            yield "temperature", self.temperature, f"must lie in [0, {MAX_TEMPERATURE:g}]"
        if not 0 <= self.top_k <= MAX_TOP_K:
            yield "top_k", self.top_k, f"must lie in 0..{MAX_TOP_K} (0 is off, 1 is greedy)"
        if not 0 <= self.top_p <= 1:
            yield "top_p", self.top_p, "must lie in [0, 1] (0 is off)"
        if not 0 <= self.top_p_decay <= 1:
            yield "top_p_decay", self.top_p_decay, "must lie in [0, 1] (0 is off)"
        if self.top_p_decay > 0 and self.top_p == 0:
            yield "top_p_decay", self.top_p_decay, "needs a top_p greater than 0 to decay"
        if self.top_p_bound and self.top_p == 0:
            yield "top_p_bound", self.top_p_bound, "needs a top_p greater than 0 to bound"
        if not 0 <= self.top_p_bound <= self.top_p:
            yield "top_p_bound", self.top_p_bound, f"must lie in (0, top_p = {self.top_p:g}]"
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            yield "seed", self.seed, f"must lie in 0..{MAX_SEED}"
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            yield "logprobs", self.logprobs, f"must lie in 0..{MAX_TOP_LOGPROBS}"

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1


@dataclass(frozen=True)
class Choice:
    """How one token is chosen. temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off.
    uniform: in [0, 1), where in the cumulative distribution the token lies."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    uniform: float = 0.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Choice()


def choose(logits_V: Tensor, choice: Choice) -> int:
    """The token of ``choice`` from raw logits; :mod:`serving.paged.choose` does many at once."""
    if choice.greedy:
        return int(logits_V.argmax())
    # From the highest down and in double: no temperature turns a score into infinity, of which
    # the softmax would be NaN.
    scores_V = (logits_V.double() - logits_V.max()) / choice.temperature
    if choice.top_k:
        scores_V = keep_top_k(scores_V, choice.top_k)
    if choice.top_p < 1:
        scores_V = keep_top_p(scores_V, choice.top_p)
    cumulative_V = scores_V.softmax(dim=-1).cumsum(dim=-1)
    # Scaled by the total, so that rounding of the sum can never step past the end; right=True
    # skips tokens of probability zero.
    return int(torch.searchsorted(cumulative_V, choice.uniform * cumulative_V[-1], right=True))


class Sampler:
    """Chooses the tokens of one sequence.

    It owns its random stream, one number a token, so that the same seed gives the same
    choices whatever else is being generated. sample: which of ``n`` continuations of a
    prompt this is; each has its own stream, and all prompts of a request have the same.
    """

    def __init__(self, params: SamplingParams, sample: int = 0) -> None:
        self.params = params
        self._top_p = params.top_p
        seed = secrets.randbits(62) if params.seed is None else params.seed
        self._generator = torch.Generator().manual_seed((seed + sample * _STRIDE) % 2**63)

    def next(self) -> Choice:
        """How the next token is to be chosen; each call is for one token, in their order."""
        if self.params.greedy:
            return GREEDY
        top_p = self._top_p if self.params.top_p > 0 and self._top_p < 1 else 1.0
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64).item()
        self._decay()
        return Choice(self.params.temperature, self.params.top_k, top_p, uniform)

    def choose(self, logits_V: Tensor) -> int:
        """The next token from raw logits (any dtype or device)."""
        return choose(logits_V, self.next())

    def _decay(self) -> None:
        if self.params.top_p_decay > 0:
            self._top_p = max(self._top_p * self.params.top_p_decay, self.params.top_p_bound)


# An odd number near 2^63 / golden ratio keeps the seeds of samples far apart.
_STRIDE = 5_700_357_409_661_599_291


def keep_top_k(scores_V: Tensor, k: int) -> Tensor:
    """All scores not below the k-th highest; the others become -inf."""
    if k >= scores_V.shape[-1]:
        return scores_V
    threshold = scores_V.topk(k).values[-1]
    return scores_V.masked_fill(scores_V < threshold, -math.inf)


def keep_top_p(scores_V: Tensor, p: float) -> Tensor:
    """The likeliest tokens up to and including the first that takes their sum over ``p``."""
    sorted_V, order_V = scores_V.sort(descending=True, stable=True)
    sums_V = sorted_V.softmax(dim=-1).cumsum(dim=-1)
    # A token goes when the sum before it was over p already; so the likeliest always stays.
    drop_V = torch.zeros_like(sums_V, dtype=torch.bool)
    drop_V[1:] = sums_V[:-1] > p
    return scores_V.masked_fill(torch.zeros_like(drop_V).scatter(0, order_V, drop_V), -math.inf)
