"""T5 with caches: logits of the full forward without any, prompts encoded once, rows that come,
go, move and are copied."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from mtk.models.t5 import T5
from mtk.tokenizers import Tokenizer
from serving.beam import search
from serving.encoder_decoder import EncoderDecoder
from serving.encoder_prompt import decoder_start
from serving.generation import Vocabulary, generate
from serving.requests import BeamParams, GenerationRequest, StopRules
from serving.sampling import SamplingParams
from tests.serving.models import (
    T5_10,
    T5_11,
    T5_MEGATRON,
    PairTokenizer,
    greedy_pair,
    tiny_model,
)

START = 257
KINDS = {"1.0": T5_10, "1.1": T5_11, "megatron": T5_MEGATRON}
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> T5:
    found = tiny_model(**KINDS[request.param])
    assert isinstance(found, T5)
    return found


def prompt_of(length: int, seed: int) -> tuple[int, ...]:
    chance = random.Random(seed)
    return tuple(chance.randrange(260) for _ in range(length))


class Row:
    """What a row should hold."""

    def __init__(self, prompt: tuple[int, ...]) -> None:
        self.prompt, self.tokens = prompt, [START]

    def expected(self, model: T5) -> torch.Tensor:
        return model(torch.tensor([self.prompt]), torch.tensor([self.tokens]))[0, -1]  # type: ignore[no-any-return, index]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)], ids=str
)
def test_any_history_of_rows_computes_the_full_forward(
    model: T5, dtype: torch.dtype, tolerance: float
) -> None:
    """Rows with prompts of all lengths, some the same, begin, end and are copied in any order."""
    model, chance = model.to(dtype), random.Random(5)
    decoder = EncoderDecoder(model, START)
    prompts = [prompt_of(length, length) for length in (1, 2, 7, 30, 61, 90)]
    rows: list[Row] = []
    for _ in range(60):
        move = chance.random()
        if (move < 0.35 and len(rows) < 6) or not rows:
            row = Row(chance.choice(prompts))
            logits_V, scored = decoder.prefill(decoder.cache.add_row(), row.prompt)
            assert scored == []
            rows.append(row)
            torch.testing.assert_close(logits_V, row.expected(model), atol=tolerance, rtol=0)
        elif move < 0.5:
            at = chance.randrange(len(rows))
            moved = decoder.cache.free_row(at)
            rows[at] = rows[moved]
            rows.pop()
        elif move < 0.6:
            chosen = [chance.randrange(len(rows)) for _ in range(chance.randrange(1, 6))]
            decoder.cache.select_rows(chosen)
            copies = [Row(rows[at].prompt) for at in chosen]
            for copy, at in zip(copies, chosen, strict=True):
                copy.tokens = list(rows[at].tokens)
            rows = copies
        else:
            for row in rows:
                row.tokens.append(chance.randrange(260))
            logits_BV = decoder.decode([row.tokens[-1] for row in rows])
            for row, logits_V in zip(rows, logits_BV, strict=True):
                torch.testing.assert_close(logits_V, row.expected(model), atol=tolerance, rtol=0)
        held = sum(map(len, {row.prompt for row in rows}))
        assert decoder.cache.tokens == held + sum(len(row.tokens) for row in rows)
    while rows:
        decoder.cache.free_row(len(rows) - 1)
        rows.pop()
    assert decoder.cache.tokens == 0


def counted(model: T5, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of what goes through the encoder from now on."""
    lengths: list[int] = []
    real = model.encoded

    def encoded(tokens_BS: torch.Tensor) -> torch.Tensor:
        lengths.append(tokens_BS.shape[1])
        return real(tokens_BS)

    monkeypatch.setattr(model, "encoded", encoded)
    return lengths


def asked(*prompts: tuple[int, ...], **values: Any) -> GenerationRequest:
    return GenerationRequest(
        prompts=prompts, **{"max_tokens": 8, "sampling": SamplingParams(seed=1), **values}
    )


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_samples_share_one_run_of_the_encoder(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(**T5_10)
    assert isinstance(model, T5)
    lengths = counted(model, monkeypatch)
    request = asked(prompt_of(9, 1), prompt_of(4, 2), samples=7)
    found = generate(model, PairTokenizer(), request, max_rows=rows)
    assert lengths == [9, 4]
    assert len({output.tokens for output in found}) > 7


@torch.inference_mode()
def test_beams_share_one_run_of_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(**T5_11)
    assert isinstance(model, T5)
    lengths = counted(model, monkeypatch)
    decoder = EncoderDecoder(model, START)
    beam = BeamParams(width=4, length_penalty=1.0, stop_token=256)
    vocabulary = Vocabulary(PairTokenizer(), 260, continues=False)
    for _ in search(decoder, vocabulary, asked(prompt_of(9, 1), beam=beam)):
        pass
    assert lengths == [9]
    # Four rows of seven tokens and the start, but one prompt.
    assert decoder.cache.tokens == 9 + 4 * 8


@torch.inference_mode()
def test_the_longest_unused_prompt_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(**T5_10)
    assert isinstance(model, T5)
    lengths = counted(model, monkeypatch)
    decoder = EncoderDecoder(model, START)
    one, two, three = (prompt_of(length, 1) for length in (3, 4, 5))
    for prompt in (one, two):
        decoder.prefill(decoder.cache.add_row(), prompt)
    decoder.cache.free_row(0)
    decoder.cache.free_row(0)
    # ``one`` was left first, so that its slot is taken and ``two`` is still there.
    for prompt in (three, two, one):
        decoder.prefill(decoder.cache.add_row(), prompt)
        decoder.cache.free_row(0)
    assert lengths == [3, 4, 5, 3]


@torch.inference_mode()
def test_nothing_of_a_broken_prompt_is_left() -> None:
    """NaN in the keys of a longer prompt must not reach a shorter one in its place."""
    model = tiny_model(**T5_10)
    assert isinstance(model, T5)
    decoder = EncoderDecoder(model, START)
    decoder.prefill(decoder.cache.add_row(), prompt_of(50, 1))
    for layer in decoder.cache._memory._layers:
        assert layer.keys_RGTD is not None and layer.values_RGTD is not None
        layer.keys_RGTD.fill_(float("nan"))
        layer.values_RGTD.fill_(float("nan"))
    decoder.cache.free_row(0)
    rows = [Row(prompt_of(3, 2)), Row(prompt_of(60, 3))]
    for row in rows:
        logits_V, _ = decoder.prefill(decoder.cache.add_row(), row.prompt)
        torch.testing.assert_close(logits_V, row.expected(model), atol=2e-4, rtol=0)
    for row in rows:
        row.tokens.append(65)
    for row, logits_V in zip(rows, decoder.decode([65, 65]), strict=True):
        torch.testing.assert_close(logits_V, row.expected(model), atol=2e-4, rtol=0)


@pytest.mark.parametrize("rows", [1, 5])
def test_batched_greedy_is_that_without_a_cache(model: T5, rows: int) -> None:
    prompts = [prompt_of(1 + 7 * i % 40, i) for i in range(9)]
    request = asked(*prompts, max_tokens=24, sampling=GREEDY)
    found = generate(model, PairTokenizer(), request, max_rows=rows)
    assert [list(output.tokens) for output in found] == [
        greedy_pair(model, prompt, 24) for prompt in prompts
    ]


def test_text_begins_anew() -> None:
    """What was generated does not go on with the prompt's text, however that ends."""
    model = tiny_model(**T5_11)
    half = "\u00e9".encode()[:1]
    bias = {"sampling": GREEDY, "max_tokens": 4}
    [output] = generate(model, PairTokenizer(), asked((*b"a:", *half), **bias))
    assert output.text == PairTokenizer().decode(output.tokens)
    stop = StopRules(line="double_eol")
    [whole] = generate(model, PairTokenizer(), asked(tuple(b"a\n"), stop=stop, **bias))
    assert whole.finish == "length"


def test_scoring_the_prompt_is_refused_by_the_decoder() -> None:
    model = tiny_model(**T5_10)
    assert isinstance(model, T5)
    decoder = EncoderDecoder(model, START)
    with pytest.raises(ValueError, match="does not predict"):
        decoder.prefill(decoder.cache.add_row(), (1, 2), score_top=0)


def test_where_the_decoder_begins() -> None:
    class Named(PairTokenizer):
        bos: int | None = 3

    class Bare(PairTokenizer):
        pad = None  # type: ignore[assignment]

    own = tiny_model(**T5_10).config
    none = tiny_model(**{**T5_10, "decoder_start_token_id": None}).config

    def start(config: Any, tokenizer: Tokenizer) -> int:
        return decoder_start(config, tokenizer)

    assert start(own, Named()) == 257
    assert start(none, Named()) == 3 and start(none, PairTokenizer()) == 257
    from mtk.errors import ConfigError

    with pytest.raises(ConfigError, match="BOS or PAD"):
        start(none, Bare())
