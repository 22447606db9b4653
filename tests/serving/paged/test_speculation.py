"""Steps with guesses give every sequence the tokens that single steps give it, one delta each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mtk.models.gpt import GPT
from serving.generation import RunningSequence
from serving.guides import Guide
from serving.paged.batch import PagedBatch
from serving.paged.lookup import DraftSettings
from serving.paged.results import Found
from serving.paged.speculation import right_part
from serving.paged.step_cost import StepCost
from serving.requests import Delta, GenerationRequest, StopRules
from serving.sampling import SamplingParams
from tests.serving.models import LLAMA_LIKE, greedy_without_cache, tiny_model
from tests.serving.paged.running import CONTEXT, ask, drain, make_batch, sequences

# Guesses are computed however bad they have been.
FREE = StepCost(several=1, each=0, wait=0)
DRAFTS = DraftSettings(shortest=1, cost=FREE, margin=0)
# As in test_batch: ways to make steps.
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ahead": {"ahead": True},
    "chunks": {"ahead": True, "tokens": 9},
    "padded": {"padded": True, "ahead": True},
    "short of blocks": {"blocks": 6, "ahead": True, "tokens": 11},
    "no prefixes": {"remember": False},
}
PROMPTS = tuple(
    tuple(text.encode())
    for text in ("a", "abcabcabcabcabc", "x" * 40, "the cat and the hat and the c", "x" * 33 + "y")
)


@torch.inference_mode()
def run(
    model: GPT, *requests: GenerationRequest, **values: Any
) -> tuple[list[list[Delta]], PagedBatch, int]:
    """All deltas of each sequence in order; the batch; steps that were made."""
    batch = make_batch(model, **values)
    made = sequences(batch, *requests)
    found: dict[RunningSequence, list[Delta]] = {sequence: [] for sequence in made}
    for sequence in made:
        batch.add(sequence)
    steps = 0
    while batch.count or batch._pending:
        steps += 1
        assert steps < 5000
        for sequence, delta in batch.step():
            found[sequence].append(delta)
    drain(batch)
    return list(found.values()), batch, steps


def same(one: Sequence[Sequence[Delta]], other: Sequence[Sequence[Delta]]) -> None:
    """Tokens, texts and ends delta by delta; log-probabilities to rounding."""
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert [(d.tokens, d.text, d.finish) for d in mine] == [
            (d.tokens, d.text, d.finish) for d in theirs
        ]
        for a, b in zip(mine, theirs, strict=True):
            assert [(i.token, [t for t, _ in i.top]) for i in a.logprobs] == [
                (i.token, [t for t, _ in i.top]) for i in b.logprobs
            ]
            numbers = [[v for i in d.logprobs for v in (i.logprob, *(v for _, v in i.top))]
                       for d in (a, b)]  # fmt: skip
            assert numbers[0] == pytest.approx(numbers[1], abs=1e-4)
            assert all(len(d.tokens) <= 1 for d in (a, b))


def of_few_words(model: GPT) -> GPT:
    """One that says a, b, c and d in an order that is its own: guesses are right now and then."""
    real = model.logits
    likely = torch.zeros(257)
    likely[97:101] = 1e3
    model.logits = lambda states: real(states) + likely.to(states.device)  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("kind", [{}, LLAMA_LIKE, {**LLAMA_LIKE, "window_size": 9}])
@pytest.mark.parametrize("way", WAYS)
def test_greedy_ids_equal_the_cacheless_decoder(kind: dict[str, Any], way: str) -> None:
    model = of_few_words(tiny_model(**kind))
    expected = [greedy_without_cache(model, prompt, 40) for prompt in PROMPTS]
    found, batch, _ = run(model, ask(*PROMPTS, max_tokens=40), drafts=DRAFTS, **WAYS[way])
    assert [[t for d in deltas for t in d.tokens] for deltas in found] == expected
    stats = batch.cache_stats()
    assert stats.drafted > stats.accepted > 20
    assert (stats.preemptions > 0) == (way == "short of blocks")


def test_accepted_guesses_save_steps() -> None:
    """A model that says the last token again: all of a guess is right."""
    model = repeating()
    asked = ask(tuple(b"zz"), max_tokens=60)
    plain, _, many = run(model, asked)
    found, batch, few = run(model, asked, drafts=DRAFTS)
    same(found, plain)
    stats = batch.cache_stats()
    assert stats.drafted == stats.accepted > 0
    assert many == 60 and few == 60 - stats.accepted and few < 15


def repeating() -> GPT:
    """Its logits are those of the token that was read last."""
    model = tiny_model(position_embedding_type="none", normalization="RMSNorm")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("layers"):
                parameter.zero_()
    return model


@pytest.mark.parametrize("seed", range(6))
def test_any_requests_in_any_schedule(seed: int) -> None:
    """All options of sampling and stopping, in random company: every delta is that of a run
    without guesses. In double, so that rounding of larger products changes no choice."""
    chance = random.Random(seed)
    model = of_few_words(tiny_model(seed, **chance.choice([{}, LLAMA_LIKE])).double())
    requests = [any_request(chance, number) for number in range(8)]
    plain, _, _ = run(model, *requests, rows=4, blocks=24)
    way = chance.choice(list(WAYS.values()))
    drafts = DraftSettings(
        most=chance.randrange(1, 10), shortest=(n := chance.randrange(1, 3)),
        longest=n + chance.randrange(4), entries=chance.choice([5, 9, 32]), cost=FREE,
        margin=0,
    )  # fmt: skip
    found, batch, _ = run(model, *requests, **{"rows": 4, "blocks": 24, **way, "drafts": drafts})
    same(found, plain)
    stats = batch.cache_stats()
    assert stats.drafted > stats.accepted > 0


def any_request(chance: random.Random, seed: int) -> GenerationRequest:
    text = chance.choices(range(97, 101), k=chance.randrange(1, 30))
    rules = {
        "token_ids": frozenset(chance.sample(range(257), 2)),
        "strings": tuple(chr(97 + chance.randrange(26)) * 2 for _ in range(2)),
        "line": chance.choice([None, "eol"]),
    }
    name = chance.choice([*rules, "none"])
    stop = StopRules(**({name: rules[name]} if name in rules else {}))  # type: ignore[arg-type]
    guide = Guide(frequency_penalty=0.5) if chance.random() < 0.2 else None
    return ask(
        tuple(text),
        # Cold enough to repeat itself, warm enough to be wrong.
        sampling=SamplingParams(
            temperature=chance.choice([0.0, 0.2, 0.4, 1.0]),
            top_k=chance.choice([0, 0, 3]),
            top_p=(p := chance.choice([0.0, 0.7])),
            top_p_decay=0.9 if p else 0.0,
            top_p_bound=0.3 if p else 0.0,
            seed=seed,
            logprobs=chance.choice([None, 0, 3]),
        ),
        stop=stop,
        guide=guide,
        newline_after_colon=chance.random() < 0.8,
        prompt_logprobs=chance.random() < 0.2,
        max_tokens=chance.randrange(0, 60),
    )


@pytest.mark.parametrize("ahead", [False, True])
def test_rejected_guesses_leave_random_numbers_for_the_right_tokens(ahead: bool) -> None:
    """With top-p that decays as well: both depend on how many tokens a sequence has."""
    model = of_few_words(tiny_model().double())
    sampling = SamplingParams(temperature=0.3, top_p=0.9, top_p_decay=0.97, top_p_bound=0.2, seed=3)
    asked = ask(*PROMPTS, sampling=sampling, max_tokens=50, samples=2)
    plain, _, _ = run(model, asked)
    found, batch, _ = run(model, asked, drafts=DRAFTS, ahead=ahead)
    same(found, plain)
    stats = batch.cache_stats()
    assert stats.drafted > stats.accepted > 50


def test_known_beginnings_hold_accepted_tokens_only() -> None:
    """What later sequences find in the cache is what was said, though wrong guesses lay there."""
    model = of_few_words(tiny_model())
    batch = make_batch(model, rows=3, blocks=18, drafts=DRAFTS)
    for prompt in PROMPTS:
        first = told(batch, ask(prompt, max_tokens=40))
        assert first == greedy_without_cache(model, prompt, 40)
        found = batch.pool.found
        turn = (*prompt, *first, *b"?")
        assert told(batch, ask(turn, max_tokens=10)) == greedy_without_cache(model, turn, 10)
        assert batch.pool.found - found == (len(prompt) + 40 - 1) // 16 * 16
    assert batch.cache_stats().drafted > batch.cache_stats().accepted


def told(batch: PagedBatch, request: GenerationRequest) -> list[int]:
    (sequence,) = sequences(batch, request)
    batch.add(sequence)
    drain(batch)
    return sequence.tokens


@pytest.mark.parametrize("seed", range(2))
def test_random_schedules(seed: int) -> None:
    """Requests come, are cancelled and end while guesses of theirs are on their way, in a cache
    that is too small for all."""
    chance, model = (
        random.Random(seed),
        of_few_words(tiny_model(**(LLAMA_LIKE if seed % 2 else {}))),
    )
    texts = [tuple(chance.choices(range(97, 99), k=chance.randrange(1, 60))) for _ in range(6)]
    full = {t: greedy_without_cache(model, t, CONTEXT - len(t)) for t in texts}
    batch = make_batch(
        model, rows=4, blocks=chance.randrange(6, 14), tokens=chance.randrange(6, 40),
        ahead=seed < 1, drafts=DRAFTS,
    )  # fmt: skip
    live, finished, asked = [], 0, 0
    with torch.inference_mode():
        while asked < 50 or batch.count or batch._pending:
            while asked < 50 and batch.count < 6 and chance.random() < 0.6:
                text = chance.choice(texts)
                wanted = chance.randrange(0, min(40, CONTEXT - len(text)) + 1)
                (made,) = sequences(batch, ask(text, max_tokens=wanted))
                batch.add(made)
                live.append(made)
                asked += 1
            if live and chance.random() < 0.05:
                victim = chance.choice(live)
                batch.remove(lambda sequence, victim=victim: sequence is victim)
            for sequence, delta in batch.step():
                assert sequence.error is None
                if delta.finish is not None:
                    wanted = sequence.request.max_tokens
                    assert sequence.tokens == full[sequence.prompt][:wanted]
                    finished += 1
    drain(batch)
    assert finished > 25 and batch.scheduler.preemptions > 0
    assert batch.cache_stats().accepted > 0


@pytest.mark.parametrize("change", [{"guide": Guide(frequency_penalty=0.5)},
                                    {"newline_after_colon": False}])  # fmt: skip
def test_what_depends_on_the_last_token_has_no_guesses(change: dict[str, Any]) -> None:
    _, batch, _ = run(repeating(), ask(tuple(b"zz"), max_tokens=30, **change), drafts=DRAFTS)
    assert batch.cache_stats().drafted == 0


def test_full_batches_have_no_guesses() -> None:
    drafts = DraftSettings(shortest=1, entries=4)
    prompts = [tuple(b"zz")] * 5
    for rows, expected in ((3, True), (4, False), (5, False)):
        asked = ask(*prompts[:rows], max_tokens=30)
        _, batch, _ = run(repeating(), asked, drafts=drafts, rows=5)
        assert (batch.cache_stats().drafted > 0) == expected


def test_a_step_has_no_more_tokens_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading goes on beside guesses, and sizes of steps stay within what was set."""
    model, sizes, read = repeating(), list[int](), list[int]()
    batch = make_batch(
        model, rows=3, tokens=12, drafts=DraftSettings(shortest=1, entries=10, most=7)
    )
    decode, chunks = batch.runner.decode, batch.runner.read

    def watched(rows: Any) -> Any:
        sizes.append(sum(row.width for row in rows))
        return decode(rows)

    def counted(parts: Any) -> Any:
        read.append(sum(part.count for part in parts))
        return chunks(parts)

    monkeypatch.setattr(batch.runner, "decode", watched)
    monkeypatch.setattr(batch.runner, "read", counted)
    with torch.inference_mode():
        made = sequences(batch, ask(tuple(b"zz"), max_tokens=80), ask(tuple(range(80))))
        batch.add(made[0])
        for _ in range(4):
            batch.step()
        batch.add(made[1])
    drain(batch)
    assert max(sizes) == 8 and sum(read) == 82 and min(read) >= 2


@pytest.mark.parametrize("broken", [False, True])
def test_nan_behind_a_guess_says_nothing(broken: bool) -> None:
    """Logits that are not finite in a step with guesses: the tokens come one by one from there,
    and the sequence ends where it would have ended without."""
    model = repeating()
    real, seen = model.logits, [0]

    def logits(states: torch.Tensor) -> torch.Tensor:
        made = real(states)
        wide = made.shape[0] > 3
        seen[0] += wide
        return made.index_fill(0, torch.tensor([2]), float("nan")) if wide else made

    model.logits = logits  # type: ignore[method-assign]
    if broken:
        with torch.no_grad():
            model.layers["0"].mlp.up.weight.fill_(float("nan"))
    asked = ask(tuple(b"zz"), max_tokens=60)
    found, _, _ = run(model, asked, drafts=DRAFTS)
    plain, _, _ = run(model, asked)
    same(found, plain)
    assert len(found[0]) == (1 if broken else 60) and seen[0] == (not broken)


def test_right_part() -> None:
    def found(*tokens: int | None) -> list[Found]:
        return [Found(token) for token in tokens]

    cases: list[tuple[tuple[int, ...], list[Found], int]] = [
        ((), found(1), 1),
        ((1,), found(1, 2), 2),
        ((2,), found(1, 2), 1),
        ((1, 2, 3), found(1, 2, 3, 4), 4),
        ((1, 2, 3), found(1, 9, 3, 4), 2),
        ((1, 2), found(None, 2, 3), 1),
        ((1, 2), found(1, None, 3), 2),
    ]
    for draft, choices, right in cases:
        assert right_part(draft, choices) == choices[:right]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("several", "each", "expected"), [(1.5, 0.05, True), (0, 1, False)])
def test_guesses_are_computed_where_they_make_tokens_cheaper(
    rows: int, several: float, each: float, expected: bool
) -> None:
    """A guess of which all is right, where a token more costs little, and as much as one alone."""
    drafts = DraftSettings(shortest=1, cost=StepCost(several=several, each=each, wait=0))
    _, batch, _ = run(repeating(), ask(*[tuple(b"zz")] * rows, max_tokens=30), drafts=drafts)
    assert (batch.cache_stats().drafted > 0) == expected


def test_bad_guesses_are_given_up() -> None:
    """Of four words at random one guess in four is right: less than a step more costs."""
    model = tiny_model()
    real, likely = model.logits, torch.zeros(257)
    likely[97:101] = 1e3
    model.logits = lambda states: 0 * real(states) + likely  # type: ignore[method-assign]
    asked = ask(tuple(b"abcd"), max_tokens=90, sampling=SamplingParams(temperature=1.0, seed=1))
    found, batch, _ = run(model, asked, drafts=DraftSettings())
    assert {t for d in found[0] for t in d.tokens} == {97, 98, 99, 100}
    assert batch.cache_stats().drafted <= 9
