"""Beam search with Megatron's scoring.

score = sum of log-probabilities / length^length_penalty, length counting the stop token.
Each step looks at the 2 x width best continuations; one that ends in the stop token
becomes a finished hypothesis if it is among the first ``width``. The search is over when
the worst of ``width`` kept hypotheses scores at least as much as the best continuation.

Shape suffixes: W beams, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.decoding import SequenceDecoder
from serving.generation import Vocabulary, not_finite
from serving.requests import FinishReason, GenerationRequest, SequenceOutput
from serving.text import TextStream


@dataclass(frozen=True)
class Hypothesis:
    """score: normalised by length. tokens: new ids without the stop token."""

    score: float
    tokens: tuple[int, ...]
    finish: FinishReason


class _Finished:
    """The ``width`` best hypotheses so far."""

    def __init__(self, width: int, length_penalty: float) -> None:
        self._width, self._penalty = width, length_penalty
        self.kept: list[Hypothesis] = []

    def normalised(self, total: float, length: int) -> float:
        return total / float(length**self._penalty)

    def add(self, total: float, length: int, tokens: Sequence[int], finish: FinishReason) -> None:
        hypothesis = Hypothesis(self.normalised(total, length), tuple(tokens), finish)
        # A stable sort keeps the earlier of equals, and the worst falls off the end.
        self.kept = sorted([*self.kept, hypothesis], key=lambda h: -h.score)[: self._width]

    def settled(self, best_total: float, length: int) -> bool:
        full = len(self.kept) == self._width
        return full and self.kept[-1].score >= self.normalised(best_total, length)


def search(
    decoder: SequenceDecoder, vocabulary: Vocabulary, request: GenerationRequest
) -> Generator[None, None, list[Hypothesis]]:
    """Best first; yields after every forward pass so that other work can go between.

    Raises ServingError (500) if the model computes NaN or infinity.

    ``decoder`` is this search's own. The request has one prompt and at least one new token.
    """
    beam, prompt = request.beam, request.prompts[0]
    if beam is None:
        raise ValueError("the request asks for no beam search")
    finished = _Finished(beam.width, beam.length_penalty)
    decoder.cache.add_row()
    logits_V, _ = decoder.prefill(0, prompt)
    logits_WV = logits_V[None]
    beams: list[list[int]] = [[]]
    totals: list[float] = [0.0]
    last_char = vocabulary.tokenizer.decode(vocabulary.before(prompt)[-4:])[-1:]
    for length in range(1, request.max_tokens + 1):
        yield
        if not torch.isfinite(logits_WV).all():
            raise not_finite()
        if not request.newline_after_colon:
            logits_WV = _without_newline(logits_WV, beams, last_char, vocabulary)
        candidates = _candidates(logits_WV[:, : vocabulary.size], totals, 2 * beam.width)
        nexts: list[tuple[float, int, int]] = []
        for rank, (total, row, token) in enumerate(candidates):
            if token != beam.stop_token:
                nexts.append((total, row, token))
            elif rank < beam.width:
                finished.add(total, length, beams[row], "stop")
            if len(nexts) == beam.width:
                break
        if finished.settled(candidates[0][0], length) or not nexts:
            return finished.kept
        beams = [[*beams[row], token] for _, row, token in nexts]
        totals = [total for total, _, _ in nexts]
        if length < request.max_tokens:
            decoder.cache.select_rows([row for _, row, _ in nexts])
            logits_WV = decoder.decode([tokens[-1] for tokens in beams])
    for total, tokens in zip(totals, beams, strict=True):
        finished.add(total, request.max_tokens, tokens, "length")
    return finished.kept


def _candidates(
    logits_WV: Tensor, totals: Sequence[float], count: int
) -> list[tuple[float, int, int]]:
    """The best (total, beam, token), best first."""
    totals_W1 = torch.tensor(totals, device=logits_WV.device)[:, None]
    sums = (logits_WV.float().log_softmax(dim=-1) + totals_W1).flatten()
    best = sums.topk(min(count, sums.numel()))
    size = logits_WV.shape[-1]
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [(value, index // size, index % size) for value, index in pairs]


def _without_newline(
    logits_WV: Tensor, beams: Sequence[Sequence[int]], before: str, vocabulary: Vocabulary
) -> Tensor:
    ends = [vocabulary.tokenizer.decode(t[-4:])[-1:] if t else before for t in beams]
    rows = [row for row, end in enumerate(ends) if end == ":"]
    if not rows:
        return logits_WV
    logits_WV = logits_WV.clone()
    for row in rows:
        # Finite, so that the log-softmax of a beam is never NaN.
        logits_WV[row, vocabulary.newlines(logits_WV.device)] = -1e10
    return logits_WV


def outputs(
    request: GenerationRequest, vocabulary: Vocabulary, found: Sequence[Hypothesis]
) -> list[SequenceOutput]:
    """The hypotheses as finished sequences, best first."""
    made = []
    for index, hypothesis in enumerate(found):
        stream = TextStream(vocabulary.tokenizer, vocabulary.before(request.prompts[0]))
        steps = [stream.push(token) for token in hypothesis.tokens]
        if steps:
            steps[-1] += stream.flush()
        made.append(
            SequenceOutput(
                index=index,
                prompt=request.prompts[0],
                tokens=hypothesis.tokens,
                text="".join(steps),
                steps=tuple(steps),
                finish=hypothesis.finish,
                score=hypothesis.score,
            )
        )
    return made
