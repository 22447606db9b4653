"""Batch, single and cache-less generation give the same logits, ids and log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtk.errors import ServingError
from serving.generation import Batch, Decoder, RunningSequence, Vocabulary, generate
from serving.requests import GenerationRequest, StopRules, check_fits
from serving.sampling import SamplingParams
from tests.serving.models import (
    EOD,
    HYBRID,
    LLAMA_LIKE,
    MAMBA,
    ByteTokenizer,
    greedy_without_cache,
    tiny_model,
)

GREEDY = SamplingParams(temperature=0)
PROMPTS = tuple(
    tuple(text.encode()) for text in ("a", "Hello world", "x" * 40, "The quick brown", "12")
)
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": LLAMA_LIKE,
    "no positions": {"position_embedding_type": "none"},
    "mamba": MAMBA,
    "hybrid": HYBRID,
    "partial rotary": {"position_embedding_type": "rope", "rotary_percent": 0.5},
}


def request(*prompts: tuple[int, ...], **values: Any) -> GenerationRequest:
    return GenerationRequest(**{"prompts": prompts, "max_tokens": 12, "sampling": GREEDY, **values})


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_ids_equal_the_cacheless_decoder(kind: str) -> None:
    model = tiny_model(**KINDS[kind])
    outputs = generate(model, ByteTokenizer(), request(*PROMPTS, max_tokens=40), max_rows=3)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert list(output.tokens) == greedy_without_cache(model, prompt, 40)
        assert output.finish == "length"


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_logits_equal_the_row_alone(kind: str) -> None:
    """Rows of different length come and go; every row's logits stay those of a full forward."""
    model = tiny_model(**KINDS[kind])
    decoder = Decoder(model)
    texts: list[list[int]] = []
    for prompt in PROMPTS:
        logits_V, _ = decoder.prefill(decoder.cache.add_row(), prompt)
        torch.testing.assert_close(logits_V, model(torch.tensor([prompt]))[0, -1], **TOLERANCE)
        texts.append(list(prompt))
    for step in range(6):
        new = [(7 * step + 13 * row) % 256 for row in range(len(texts))]
        logits_BV = decoder.decode(new)
        for row, text in enumerate(texts):
            text.append(new[row])
            alone_V = model(torch.tensor([text]))[0, -1]
            torch.testing.assert_close(logits_BV[row], alone_V, **TOLERANCE)
        if step == 2:  # free a row in the middle: the last one takes its place
            moved = decoder.cache.free_row(1)
            texts[1] = texts[moved]
            texts.pop()


@torch.inference_mode()
def test_nan_of_an_ended_sequence_reaches_nobody_else() -> None:
    """A sequence that overflowed leaves NaN in its row; a mask alone would not hide it."""
    model = tiny_model()
    decoder = Decoder(model)
    for prompt in (PROMPTS[2], PROMPTS[2], PROMPTS[2], PROMPTS[0]):
        decoder.prefill(decoder.cache.add_row(), prompt)
    for layer in decoder.cache._layers:
        for store in (layer.keys_RGTD, layer.values_RGTD):
            assert store is not None
            store[1:3] = float("nan")
    decoder.cache.free_row(1)  # the short last row takes its place
    decoder.cache.free_row(2)
    decoder.prefill(decoder.cache.add_row(), PROMPTS[4])
    logits_BV = decoder.decode([65, 66, 67])
    for row, (prompt, token) in enumerate([(PROMPTS[2], 65), (PROMPTS[0], 66), (PROMPTS[4], 67)]):
        alone_V = model(torch.tensor([[*prompt, token]]))[0, -1]
        torch.testing.assert_close(logits_BV[row], alone_V, **TOLERANCE)


TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def test_a_wrong_mask_would_be_caught() -> None:
    """The parity check bites: a row that sees one token too many has other logits."""
    model = tiny_model()
    with torch.inference_mode():
        decoder = Decoder(model)
        for prompt in PROMPTS[:2]:
            decoder.prefill(decoder.cache.add_row(), prompt)
        decoder.cache.lengths[0] += 1
        logits_V = decoder.decode([65, 66])[0]
        alone_V = model(torch.tensor([[*PROMPTS[0], 65]]))[0, -1]
    assert (logits_V - alone_V).abs().max() > 1e-3


def test_logprobs_are_raw_and_match_a_full_forward() -> None:
    model = tiny_model()
    sampling = SamplingParams(temperature=0.3, top_k=5, seed=3, logprobs=4)
    asked = request(PROMPTS[1], sampling=sampling, prompt_logprobs=True)
    (output,) = generate(model, ByteTokenizer(), asked)
    ids = [*PROMPTS[1], *output.tokens]
    with torch.inference_mode():
        expected_SV = model(torch.tensor([ids]))[0].log_softmax(dim=-1)
    found = [*output.prompt_logprobs, *output.logprobs]
    assert len(found) == len(ids) - 1
    for position, item in enumerate(found):
        assert item.token == ids[position + 1]
        assert item.logprob == pytest.approx(float(expected_SV[position, item.token]), abs=1e-4)
        best = expected_SV[position].topk(4)
        assert [token for token, _ in item.top] == best.indices.tolist()


def test_scoring_alone_gives_no_tokens() -> None:
    scoring = SamplingParams(temperature=0, logprobs=0)
    asked = request(PROMPTS[2], max_tokens=0, sampling=scoring, prompt_logprobs=True)
    (output,) = generate(tiny_model(), ByteTokenizer(), asked)
    assert output.tokens == () and output.text == ""
    assert len(output.prompt_logprobs) == len(PROMPTS[2]) - 1


def test_long_prompts_are_scored_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(
        PROMPTS[2],
        max_tokens=0,
        sampling=SamplingParams(temperature=0, logprobs=0),
        prompt_logprobs=True,
    )
    model = tiny_model()
    (whole,) = generate(model, ByteTokenizer(), asked)
    monkeypatch.setattr("serving.generation.SCORED_AT_ONCE", 7)
    (sliced,) = generate(model, ByteTokenizer(), asked)
    assert [x.logprob for x in sliced.prompt_logprobs] == pytest.approx(
        [x.logprob for x in whole.prompt_logprobs], abs=1e-5
    )


def test_a_seed_gives_the_same_text_in_any_company() -> None:
    model, tokenizer = tiny_model(), ByteTokenizer()
    sampling = SamplingParams(seed=11, temperature=1.0)
    (alone,) = generate(model, tokenizer, request(PROMPTS[1], sampling=sampling, max_tokens=30))
    company = generate(model, tokenizer, request(*PROMPTS, sampling=sampling, max_tokens=30))
    assert company[1].tokens == alone.tokens
    other = SamplingParams(seed=12, temperature=1.0)
    (different,) = generate(model, tokenizer, request(PROMPTS[1], sampling=other, max_tokens=30))
    assert different.tokens != alone.tokens


def test_samples_of_a_prompt_differ_and_are_reproducible() -> None:
    model, tokenizer = tiny_model(), ByteTokenizer()
    asked = request(PROMPTS[1], sampling=SamplingParams(seed=5), samples=3, max_tokens=20)
    first, again = generate(model, tokenizer, asked), generate(model, tokenizer, asked)
    assert [o.tokens for o in first] == [o.tokens for o in again]
    assert len({o.tokens for o in first}) == 3


class Scripted(RunningSequence):
    """A sequence that is told its tokens."""

    def say(self, *tokens: int) -> str:
        text = ""
        for token in tokens:
            if self.finish is not None:
                break
            logits_V = torch.zeros(257)
            logits_V[token] = 1e4
            text += self.advance(logits_V).text
        return text


def scripted(prompt: str = "x", **values: Any) -> Scripted:
    asked = request(tuple(prompt.encode()), **{"max_tokens": 50, **values})
    return Scripted(asked, 0, Vocabulary(ByteTokenizer(), 257))


@pytest.mark.parametrize(
    ("rules", "prompt", "said", "text", "tokens"),
    [
        (StopRules(token_ids=frozenset({EOD})), "x", "ab\x00cd", "ab", 3),
        (StopRules(strings=("END",)), "x", "abENDcd", "ab", 5),
        (StopRules(strings=("b", "ab")), "x", "xxabc", "xx", 4),
        (StopRules(strings=("é!",)), "x", "aé!b", "a", 4),
        (StopRules(line="eol"), "x", "ab\ncd", "ab\n", 3),
        (StopRules(line="double_eol"), "x", "a\nb\n\nc", "a\nb\n\n", 5),
        (StopRules(line="double_eol"), "x\n", "\nab", "\n", 1),
        (StopRules(line="double_eol"), "x\n\n", "ab\n\n", "ab\n\n", 4),
    ],
)
def test_stop_rules(rules: StopRules, prompt: str, said: str, text: str, tokens: int) -> None:
    sequence = scripted(prompt, stop=rules)
    ids = [EOD if byte == 0 else byte for byte in said.encode()]
    assert sequence.say(*ids) == text
    assert sequence.finish == "stop"
    output = sequence.output()
    assert output.text == text and len(output.tokens) == tokens


def test_half_a_stop_string_comes_out_in_the_end() -> None:
    sequence = scripted(stop=StopRules(strings=("END",)), max_tokens=4)
    assert sequence.say(*b"abEN") == "abEN"
    assert sequence.finish == "length"


def test_text_streams_whole_characters() -> None:
    sequence = scripted(max_tokens=50)
    parts = [sequence.say(byte) for byte in "é€😀a".encode()]
    assert parts == ["", "é", "", "", "€", "", "", "", "😀", "a"]


def test_no_newline_after_a_colon() -> None:
    sequence = scripted("Q:", newline_after_colon=False)
    logits_V = torch.zeros(257)
    logits_V[10], logits_V[65] = 9.0, 5.0
    assert sequence.advance(logits_V).tokens == (65,)
    assert sequence.advance(logits_V).tokens == (10,)


def test_padded_ids_are_never_drawn() -> None:
    vocabulary = Vocabulary(ByteTokenizer(), 300)
    sequence = RunningSequence(request((65,)), 0, vocabulary)
    logits_V = torch.zeros(300)
    logits_V[299] = 9.0
    assert sequence.advance(logits_V).tokens[0] < 257


def test_nan_fails_its_own_sequence_only() -> None:
    batch = Batch(Decoder(tiny_model()))
    asked = request(*PROMPTS[:2])
    vocabulary = Vocabulary(ByteTokenizer(), 257)
    good, bad = (RunningSequence(asked, i, vocabulary) for i in range(2))
    with torch.inference_mode():
        batch.add(good)
        batch.add(bad)
        bad.advance(torch.full((257,), float("nan")))
        assert bad.error is not None and bad.error.status == 500
        batch.step()
    assert batch.running == [good]


@pytest.mark.parametrize(
    ("prompt", "tokens", "words"),
    [
        ((1, 2, 3), 94, "97 were requested (3 in the prompt, 94 to generate)"),
        ((1, 257), 1, "257"),
        ((), 1, "no tokens"),
    ],
)
def test_what_does_not_fit_is_refused(prompt: tuple[int, ...], tokens: int, words: str) -> None:
    with pytest.raises(ServingError) as caught:
        check_fits(request(prompt, max_tokens=tokens), context=96, vocab=257)
    assert words in str(caught.value) and caught.value.status == 400
