"""A paged batch gives every sequence what it would get alone, however steps are made."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from serving.generation import generate
from serving.paged.layers import can_page
from serving.requests import GenerationRequest, StopRules
from serving.sampling import SamplingParams
from tests.serving.models import (
    HYBRID,
    LLAMA_LIKE,
    MAMBA,
    ByteTokenizer,
    greedy_without_cache,
    tiny_model,
)
from tests.serving.paged.running import (
    CONTEXT,
    ask,
    drain,
    generate_paged,
    make_batch,
    sequences,
)

MOE = {"num_experts": 4, "moe_router_topk": 2}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": LLAMA_LIKE,
    "moe": {**LLAMA_LIKE, **MOE},
    "no positions": {"position_embedding_type": "none"},
    "partial rotary": {"position_embedding_type": "rope", "rotary_percent": 0.5},
    "interleaved": {**LLAMA_LIKE, "rotary_interleaved": True},
    "normed heads": {**LLAMA_LIKE, "qk_layernorm": True},
    "window": {**LLAMA_LIKE, "window_size": 9},
    "parallel": {"use_parallel_residual": True},
    "attention and mlp layers": {"num_layers": 4, "hybrid_layer_pattern": "*-*-"},
}
# One way to make steps a line: one by one; ahead of the host; chunks of few tokens; fixed sizes;
# hardly any blocks, so that sequences lose theirs; without finding beginnings.
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ahead": {"ahead": True},
    "chunks": {"ahead": True, "tokens": 7},
    "padded": {"padded": True, "ahead": True},
    "short of blocks": {"blocks": 6, "ahead": True, "tokens": 11},
    "no prefixes": {"remember": False},
}
PROMPTS = tuple(
    tuple(text.encode())
    for text in ("a", "Hello world", "x" * 40, "x" * 40, "The quick brown fox", "x" * 33 + "y")
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_greedy_ids_equal_the_cacheless_decoder(kind: str, way: str) -> None:
    model = tiny_model(**KINDS[kind])
    expected = [greedy_without_cache(model, prompt, 40) for prompt in PROMPTS]
    outputs, batch = generate_paged(model, ask(*PROMPTS, max_tokens=40), **WAYS[way])
    assert [list(output.tokens) for output in outputs] == expected
    stats = batch.cache_stats()
    assert (stats.preemptions > 0) == (way == "short of blocks")
    assert (stats.prefix_found > 0) == (way != "no prefixes")


@pytest.mark.parametrize("kind", [MAMBA, HYBRID, {"position_embedding_type": "alibi"}])
def test_what_blocks_do_not_hold_is_told(kind: dict[str, Any]) -> None:
    assert not can_page(tiny_model(**kind))


def test_seeds_give_the_tokens_of_the_dense_batch() -> None:
    """All options of sampling in one batch, whatever the company and the schedule."""
    model, chance = tiny_model(), random.Random(5)
    requests = [
        ask(
            chance.choice(PROMPTS),
            sampling=SamplingParams(
                temperature=chance.choice([0.0, 0.7, 1.3]),
                top_k=chance.choice([0, 0, 5, 40]),
                top_p=(p := chance.choice([0.0, 0.5, 0.9])),
                top_p_decay=0.9 if p else 0.0,
                top_p_bound=0.3 if p else 0.0,
                seed=seed,
                logprobs=chance.choice([None, 0, 3]),
            ),
            newline_after_colon=chance.random() < 0.5,
            samples=2,
            max_tokens=25,
        )
        for seed in range(12)
    ]
    expected = [o for r in requests for o in generate(model, ByteTokenizer(), r)]
    for way in WAYS.values():
        found, _ = generate_paged(model, *requests, **way)
        assert [o.tokens for o in found] == [o.tokens for o in expected]
        assert [o.text for o in found] == [o.text for o in expected]
        for mine, theirs in zip(found, expected, strict=True):
            assert [len(item.top) for item in mine.logprobs] == [
                len(item.top) for item in theirs.logprobs
            ]
            assert [item.logprob for item in mine.logprobs] == pytest.approx(
                [item.logprob for item in theirs.logprobs], abs=1e-4
            )


def test_no_newline_after_a_colon_though_steps_are_ahead() -> None:
    """The text of the last token must be known before the next is chosen."""
    model = tiny_model()
    real = model.logits
    likely = torch.zeros(257)
    likely[[10, 58, 65]] = 1e3
    model.logits = lambda states: real(states) + likely  # type: ignore[method-assign]
    asked = ask(*PROMPTS, max_tokens=50, newline_after_colon=False, sampling=sampling())
    expected = generate(model, ByteTokenizer(), asked)
    found, _ = generate_paged(model, asked, ahead=True)
    assert [o.tokens for o in found] == [o.tokens for o in expected]
    text = "".join(o.text for o in found)
    assert ":" in text and "A\n" in text and ":\n" not in text


def sampling(**values: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": 1, **values})


@pytest.mark.parametrize("way", WAYS)
def test_prompts_are_scored_as_by_the_dense_batch(way: str) -> None:
    model = tiny_model()
    scoring = SamplingParams(temperature=0, logprobs=2)
    asked = [
        ask(*PROMPTS, sampling=scoring, prompt_logprobs=True, max_tokens=count) for count in (0, 5)
    ]
    expected = [o for r in asked for o in generate(model, ByteTokenizer(), r)]
    found, _ = generate_paged(model, *asked, **WAYS[way])
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.tokens == theirs.tokens and mine.finish == theirs.finish
        for one, other in zip(mine.prompt_logprobs, theirs.prompt_logprobs, strict=True):
            assert one.token == other.token
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [t for t, _ in one.top] == [t for t, _ in other.top]


def test_stop_rules_waste_a_step_and_nothing_else() -> None:
    model = tiny_model()
    for stop in (StopRules(token_ids=frozenset(range(0, 257, 9))), StopRules(line="eol")):
        asked = ask(*PROMPTS, max_tokens=50, stop=stop, sampling=sampling())
        expected = generate(model, ByteTokenizer(), asked)
        for way in WAYS.values():
            found, _ = generate_paged(model, asked, **way)
            assert [(o.tokens, o.text, o.finish) for o in found] == [
                (o.tokens, o.text, o.finish) for o in expected
            ]


@pytest.mark.parametrize("seed", range(4))
def test_random_schedules(seed: int) -> None:
    """Requests come, are cancelled and end at any time, in a cache that is too small for all:
    every one that ends has its own text, and nothing is left over. 1,000 requests in all."""
    chance, model = random.Random(seed), tiny_model(**(LLAMA_LIKE if seed % 2 else {}))
    texts = [tuple(chance.choices(range(97, 100), k=chance.randrange(1, 60))) for _ in range(6)]
    full = {t: greedy_without_cache(model, t, CONTEXT - len(t)) for t in texts}
    batch = make_batch(
        model, rows=4, blocks=chance.randrange(6, 14), tokens=chance.randrange(6, 40),
        ahead=seed < 3, padded=seed == 2,
    )  # fmt: skip
    live, finished, asked = [], 0, 0
    with torch.inference_mode():
        while asked < 250 or batch.count or batch._pending:
            while asked < 250 and batch.count < 6 and chance.random() < 0.6:
                text = chance.choice(texts)
                wanted = chance.randrange(0, min(30, CONTEXT - len(text)) + 1)
                (made,) = sequences(batch, ask(text, max_tokens=wanted))
                batch.add(made)
                live.append(made)
                asked += 1
            if live and chance.random() < 0.05:
                victim = chance.choice(live)
                batch.remove(lambda sequence, victim=victim: sequence is victim)
            for sequence, _ in batch.step():
                assert sequence.error is None
                if sequence.finish is not None:
                    assert sequence.finish == "length"
                    wanted = sequence.request.max_tokens
                    assert sequence.tokens == full[sequence.prompt][:wanted]
                    finished += 1
    drain(batch)
    assert finished > 100 and batch.scheduler.preemptions > 0


def test_nan_of_one_sequence_reaches_no_other() -> None:
    """Blocks of a sequence that overflowed are used again, with NaN behind the new tokens; what
    they held is not found as a beginning either."""
    model = tiny_model()
    batch = make_batch(model, blocks=6, rows=2)
    generate_into(batch, ask(PROMPTS[2]))
    for store in (*batch.runner.storage.keys_KGPD, *batch.runner.storage.values_KGPD):
        with torch.inference_mode():
            store.fill_(float("nan"))
    # Its beginning is remembered, and now NaN.
    (bad,) = generate_into(batch, ask(PROMPTS[2]))
    assert bad.error is not None and bad.error.status == 500
    for prompt in PROMPTS:
        (good,) = generate_into(batch, ask(prompt))
        assert good.tokens == greedy_without_cache(model, prompt, 12)


def generate_into(batch: Any, request: GenerationRequest) -> list[Any]:
    made = sequences(batch, request)
    for sequence in made:
        batch.add(sequence)
    drain(batch)
    return made


def test_samples_of_a_prompt_compute_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = tiny_model(), (*range(64), 5)
    batch = make_batch(model, rows=4, blocks=40)
    read: list[int] = []
    real = batch.runner.read

    def counted(chunks: Any) -> Any:
        read.extend(chunk.count for chunk in chunks)
        return real(chunks)

    monkeypatch.setattr(batch.runner, "read", counted)
    made = generate_into(batch, ask(prompt, samples=4, sampling=sampling(), max_tokens=20))
    assert read == [65, 1, 1, 1]
    assert batch.pool.asked == 260 and batch.pool.found == 192
    outputs = generate(model, ByteTokenizer(), made[0].request)
    assert [m.tokens for m in made] == [list(o.tokens) for o in outputs]


def test_a_conversation_is_not_read_again() -> None:
    """What was generated is remembered too: the next turn begins with it."""
    model = tiny_model()
    batch = make_batch(model)
    (first,) = generate_into(batch, ask(tuple(b"a question of some length"), max_tokens=30))
    found = batch.pool.found
    turn = (*first.prompt, *first.tokens, *b" and then?")
    (second,) = generate_into(batch, ask(turn, max_tokens=10))
    assert batch.pool.found - found == (len(first.prompt) + 30 - 1) // 16 * 16
    assert second.tokens == greedy_without_cache(model, turn, 10)


def test_a_long_prompt_does_not_hold_others_up() -> None:
    model = tiny_model()
    batch = make_batch(model, rows=3, tokens=8)
    quick, long = sequences(batch, ask(PROMPTS[0], max_tokens=20), ask(tuple(range(80))))
    batch.add(quick)
    with torch.inference_mode():
        batch.step()
        batch.add(long)
        for step in range(2, 11):
            batch.step()
            assert len(quick.tokens) == step and not long.tokens
    drain(batch)
    assert long.tokens == greedy_without_cache(model, tuple(range(80)), 12)
