"""In steps of fixed shapes a sequence gets the same bits whatever else there is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mtk.config import make
from mtk.config.serve import CacheConfig, ServeConfig
from mtk.errors import ConfigError
from mtk.models.gpt import GPT
from serving.paged.batch import PagedBatch
from serving.paged.budget import paged_settings
from serving.paged.fixed import steady_rows
from serving.paged.runner import look
from serving.sampling import SamplingParams
from stages.serve import paged_cache
from tests.serving.models import LLAMA_LIKE, MAMBA, greedy_without_cache, tiny_model
from tests.serving.paged.running import ask, drain, make_batch, sequences

KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": LLAMA_LIKE,
    "window": {**LLAMA_LIKE, "window_size": 9},
}
PROMPT, NEW = tuple(b"The quick brown fox jumps over it"), 20


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Between which a product's rows are divided, not always into equal parts."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def company(seed: int) -> list[Any]:
    """Requests of any length, some of which begin as ``PROMPT`` does, or go on where it ended."""
    chance = random.Random(seed)
    asked = []
    for _ in range(chance.randint(3, 12)):
        own = tuple(chance.randrange(256) for _ in range(chance.randint(1, 45)))
        shared = PROMPT[: chance.choice([0, 0, 16, 20, 33])]
        sampling = SamplingParams(temperature=chance.choice([0.0, 1.0]), top_p=0.9, seed=seed)
        prompt = (shared + own)[:60]
        asked.append(ask(prompt, max_tokens=chance.randint(1, 30), sampling=sampling))
    return asked


def logits_of(model: GPT, *, seed: int | None, size: int = 5, **values: Any) -> list[Tensor]:
    """Of every token of ``PROMPT``'s answer, in the company of ``seed`` or alone."""
    batch = make_batch(model, rows=size, **{"blocks": 40, "window": 32, **values})
    others = [] if seed is None else sequences(batch, *company(seed))
    (mine,) = sequences(batch, ask(PROMPT, max_tokens=NEW))
    seen: list[Tensor] = []
    _spy(batch, mine, seen)
    half = len(others) // 2
    with torch.inference_mode():
        for other in others[:half]:
            batch.add(other)
        for _ in range(seed or 0):
            batch.step()
        batch.add(mine)
        for other in others[half:]:
            batch.add(other)
            batch.step()
    drain(batch)
    assert mine.error is None and len(seen) == NEW
    return seen


def _spy(batch: PagedBatch, mine: Any, seen: list[Tensor]) -> None:
    real = batch._choose

    def choose(launched: Any, rows: Any) -> Any:
        for row, logits_V in zip(rows, launched.logits_BV, strict=True):
            if row.sequence is mine:
                seen.append(logits_V.clone())
        return real(launched, rows)

    batch._choose = choose  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_same_bits_in_any_company(kind: str) -> None:
    check_company(tiny_model(**KINDS[kind]), seeds=6)


@pytest.mark.usefixtures("two_threads")
def test_with_threads_too() -> None:
    check_company(tiny_model(**LLAMA_LIKE), seeds=1)


def check_company(model: GPT, seeds: int) -> None:
    alone = logits_of(model, seed=None)
    for seed in range(1, seeds + 1):
        found = logits_of(model, seed=seed, ahead=seed % 2 == 0)
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True)), seed


def test_a_text_known_from_an_earlier_request_gives_the_same_bits() -> None:
    """Of its beginning only what was read, as it is now, is taken from the cache."""
    model = tiny_model(**LLAMA_LIKE)
    batch = make_batch(model, rows=3, blocks=40, window=32)
    (first,) = sequences(batch, ask(PROMPT, max_tokens=30))
    batch.add(first)
    drain(batch)
    turn = PROMPT + tuple(first.tokens)
    found: list[list[Tensor]] = []
    for each in (batch, make_batch(model, rows=3, blocks=40, window=32)):
        (again,) = sequences(each, ask(turn, max_tokens=NEW))
        found.append([])
        _spy(each, again, found[-1])
        each.add(again)
        drain(each)
    assert batch.cache_stats().prefix_found == 32
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_a_broken_text_left_in_blocks_is_not_looked_at() -> None:
    model = tiny_model(**LLAMA_LIKE)
    batch = make_batch(model, rows=3, blocks=6, window=32)
    storage = batch.runner.storage
    with torch.inference_mode():
        for store in storage.keys_KGPD + storage.values_KGPD:
            store[1:] = float("nan")
    (mine,) = sequences(batch, ask(PROMPT[:19], max_tokens=NEW))
    batch.add(mine)
    drain(batch)
    assert mine.tokens == greedy_without_cache(model, PROMPT[:19], NEW)


def test_sequences_wait_until_all_they_can_become_fits() -> None:
    """None loses its blocks, and all get the tokens of the simplest decoder."""
    model = tiny_model()
    batch = make_batch(model, rows=4, blocks=8, window=16)
    made = sequences(batch, *(ask(PROMPT[: 3 * i + 2], max_tokens=40) for i in range(7)))
    for each in made:
        batch.add(each)
    drain(batch)
    assert batch.cache_stats().preemptions == 0
    for i, each in enumerate(made):
        assert each.tokens == greedy_without_cache(model, PROMPT[: 3 * i + 2], 40)


def test_a_number_of_rows_that_treats_them_alike_is_found() -> None:
    tried: list[int] = []

    def logits_of_ids(ids_S: Tensor) -> Tensor:
        tried.append(len(ids_S))
        logits_SV = torch.ones(len(ids_S), 3)
        if len(ids_S) % 4:
            logits_SV[-1, 1] += 1e-6
        return logits_SV

    assert steady_rows(logits_of_ids, 5, 100) == 8 and sorted(set(tried)) == [5, 6, 7, 8]
    assert steady_rows(logits_of_ids, 4, 100) == 4
    with pytest.raises(ConfigError, match="--max-batch-size"):
        steady_rows(lambda ids_S: torch.arange(float(len(ids_S)))[:, None], 5, 100)


def test_what_cannot_be_deterministic_is_told() -> None:
    options = CacheConfig(deterministic_mode=True)
    assert paged_settings(tiny_model(), options, rows=2, context=64).window == 64
    experts = tiny_model(**LLAMA_LIKE, num_experts=4, moe_router_topk=2)
    with pytest.raises(ConfigError, match="expert"):
        paged_settings(experts, options, rows=2, context=64)
    with pytest.raises(ConfigError, match="deterministic_mode"):
        paged_cache(options, tiny_model(**MAMBA))
    with pytest.raises(ConfigError, match="needs the paged cache"):
        make(CacheConfig, deterministic_mode=True, kv_cache="dense")
    with pytest.raises(ConfigError, match="--engine torch"):
        make(ServeConfig, load="x", engine="tensorrt-llm", cache=options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_are_seen(bad: float) -> None:
    logits_BV = torch.randn(3, 70)
    logits_BV[1, 60] = bad
    assert look(logits_BV, 50).finite_B.tolist() == [True, False, True]
