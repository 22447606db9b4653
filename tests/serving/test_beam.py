"""Beam search against exhaustive enumeration and against a naive form without a cache."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mtk.models.gpt import GPT
from mtk.tokenizers.null import NullTokenizer
from serving import beam
from serving.encoder_prompt import unlimited_prompt
from serving.generation import Vocabulary, decoder_for
from serving.requests import MAX_PENALTY, BeamParams, GenerationRequest
from tests.serving.models import T5_10, T5_11, tiny_model

STOP, VOCAB = 4, 5
PROMPT = (1, 2, 0)


class Letters(NullTokenizer):
    """Five tokens a, b, c, d and the end of document."""

    def __init__(self) -> None:
        super().__init__({"vocab_size": VOCAB - 1, "eod": None})


def toy(seed: int) -> GPT:
    return tiny_model(seed, vocab_size=VOCAB, init_method_std=0.5)


def search(model: GPT, width: int, length: int, penalty: float) -> list[beam.Hypothesis]:
    params = BeamParams(width=width, length_penalty=penalty, stop_token=STOP)
    request = GenerationRequest(prompts=(PROMPT,), max_tokens=length, beam=params)
    decoder = decoder_for(model, unlimited_prompt(model.config, Letters()))
    steps = beam.search(decoder, Vocabulary(Letters(), VOCAB), request)
    with torch.inference_mode():
        while True:
            try:
                next(steps)
            except StopIteration as end:
                found: list[beam.Hypothesis] = end.value
                return found


@pytest.mark.parametrize("penalty", [-MAX_PENALTY, MAX_PENALTY])
def test_no_length_takes_a_score_out_of_range(penalty: float) -> None:
    score = beam._Finished(2, penalty).normalised(-1e7, 10_000_000)
    assert math.isfinite(score) and score < 0


@torch.inference_mode()
def log_probability(model: GPT, tokens: Sequence[int]) -> float:
    if model.config.family == "t5":
        ids, start = torch.tensor([[STOP, *tokens]]), 0
        logits_SV = model(torch.tensor([PROMPT]), ids)[0]
    else:
        ids, start = torch.tensor([[*PROMPT, *tokens]]), len(PROMPT) - 1
        logits_SV = model(ids)[0]
    logs_SV = logits_SV.log_softmax(dim=-1)
    return sum(float(logs_SV[start + i, token]) for i, token in enumerate(tokens))


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_a_wide_beam_is_exhaustive(penalty: float) -> None:
    model, length = toy(1), 3
    letters = range(VOCAB - 1)
    every = [(s, s) for s in itertools.product(letters, repeat=length)]
    for size in range(length):
        every += [(s, (*s, STOP)) for s in itertools.product(letters, repeat=size)]
    scored = sorted(
        ((log_probability(model, full) / len(full) ** penalty, shown) for shown, full in every),
        reverse=True,
    )
    found = search(model, 200, length, penalty)
    assert [h.tokens for h in found] == [tokens for _, tokens in scored]
    assert [h.score for h in found] == pytest.approx([score for score, _ in scored], abs=1e-4)


def naive(
    model: GPT, width: int, length: int, penalty: float
) -> list[tuple[float, tuple[int, ...]]]:
    """The reference's rules on whole forwards; no cache, no tensors kept."""
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    done: list[tuple[float, tuple[int, ...]]] = []
    for step in range(1, length + 1):
        options = [
            (log_probability(model, (*tokens, token)), tokens, token)
            for _, tokens in beams
            for token in range(VOCAB)
        ]
        options.sort(key=lambda option: -option[0])
        beams = []
        for rank, (total, tokens, token) in enumerate(options[: 2 * width]):
            if token == STOP:
                if rank < width:
                    done.append((total / step**penalty, tokens))
                    done = sorted(done, reverse=True)[:width]
            elif len(beams) < width:
                beams.append((total, (*tokens, token)))
        if len(done) == width and done[-1][0] >= options[0][0] / step**penalty:
            return done
    done += [(total / length**penalty, tokens) for total, tokens in beams]
    return sorted(done, reverse=True)[:width]


# Seeds 22 and 43 meet a stop token beyond the first ``width`` candidates.
@pytest.mark.parametrize("seed", [0, 1, 2, 22, 43])
@pytest.mark.parametrize(("width", "penalty"), [(1, 1.0), (2, 0.5), (3, 1.5), (4, 0.0), (3, -1.0)])
def test_narrow_beams_follow_the_reference(seed: int, width: int, penalty: float) -> None:
    model = toy(seed)
    found = search(model, width, 7, penalty)
    expected = naive(model, width, 7, penalty)
    assert [h.tokens for h in found] == [tokens for _, tokens in expected]
    assert [h.score for h in found] == pytest.approx([score for score, _ in expected], abs=1e-4)


@pytest.mark.parametrize("kind", [T5_10, T5_11], ids=["1.0", "1.1"])
@pytest.mark.parametrize(("width", "penalty"), [(1, 1.0), (3, 1.5), (4, 0.0), (3, -1.0)])
def test_beams_of_a_t5_follow_the_reference(
    kind: dict[str, Any], width: int, penalty: float
) -> None:
    changes = {**kind, "vocab_size": VOCAB, "decoder_start_token_id": STOP}
    model = tiny_model(**changes, init_method_std=0.5)
    found, expected = search(model, width, 6, penalty), naive(model, width, 6, penalty)
    assert [h.tokens for h in found] == [tokens for _, tokens in expected]
    assert [h.score for h in found] == pytest.approx([score for score, _ in expected], abs=1e-4)


def test_some_of_these_searches_end_with_the_stop_token() -> None:
    ends = {h.finish for seed in range(4) for h in search(toy(seed), 3, 7, 1.5)}
    assert ends == {"stop", "length"}
