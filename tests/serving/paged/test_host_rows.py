"""Rows on the host give what attention to blocks gives, and hold what runs, nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtk.models.gpt import GPT
from serving.paged import host_rows
from serving.paged.batch import PagedBatch
from tests.serving.models import LLAMA_LIKE, tiny_model
from tests.serving.paged.running import ask, drain, make_batch, sequences

KINDS: dict[str, dict[str, Any]] = {
    "learned positions": {},
    "groups": LLAMA_LIKE,
    "partial rotary": {**LLAMA_LIKE, "rotary_percent": 0.5},
    "interleaved": {**LLAMA_LIKE, "rotary_interleaved": True},
    "normed heads": {**LLAMA_LIKE, "qk_layernorm": True},
    "window": {**LLAMA_LIKE, "window_size": 9},
}
PROMPTS = (tuple(b"a"), tuple(b"x" * 37), tuple(b"The quick brown fox"), tuple(b"x" * 33 + b"y"))


def logits_of(batch: PagedBatch, monkeypatch: pytest.MonkeyPatch) -> dict[int, list[torch.Tensor]]:
    """Logits of every step of decoding by the age of their row, as they are computed."""
    seen: dict[int, list[torch.Tensor]] = {}
    real = batch.runner.decode

    def decode(rows: Any) -> Any:
        launched = real(rows)
        for row, logits_V in zip(rows, launched.logits_BV, strict=True):
            seen.setdefault(row.age, []).append(logits_V.clone())
        return launched

    monkeypatch.setattr(batch.runner, "decode", decode)
    return seen


def run(model: GPT, monkeypatch: pytest.MonkeyPatch, **values: Any) -> dict[int, Any]:
    batch = make_batch(model, blocks=24, **values)
    seen = logits_of(batch, monkeypatch)
    for sequence in sequences(batch, ask(*PROMPTS, max_tokens=50)):
        batch.add(sequence)
    drain(batch)
    return seen


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_attention_to_blocks(
    kind: str, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``padded`` steps copy and mask blocks, the plain way."""
    model = tiny_model(**KINDS[kind])
    if apart:
        monkeypatch.setattr(host_rows, "CALL_TOKENS", -1000)
    found = run(model, monkeypatch)
    expected = run(model, monkeypatch, padded=True)
    assert found.keys() == expected.keys() == {0, 1, 2, 3}
    for age, steps in expected.items():
        torch.testing.assert_close(
            torch.stack(found[age]), torch.stack(steps), rtol=1e-4, atol=1e-4
        )


def test_rows_hold_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Content, whatever came, ended and moved; full blocks go back to the cache."""
    model = tiny_model(**LLAMA_LIKE)
    batch = make_batch(model, rows=3, blocks=12, tokens=9)
    host = batch.runner.host
    assert host is not None
    for length in (5, 40, 11, 30, 3, 21):
        for sequence in sequences(batch, ask(tuple(range(length)), max_tokens=length)):
            batch.add(sequence)
    compared, most = 0, 0
    with torch.inference_mode():
        for _ in range(300):
            batch.step()
            most = max(most, host.count)
            compared += sum(_same(batch, row) for row in batch.scheduler.running)
            if not batch.count:
                break
    assert compared > 50 and most == 3
    host.ordered([])
    assert host.count == 0 and host.bytes == 0


def _same(batch: PagedBatch, row: Any) -> bool:
    """Whether the row lies on the host and, where it does, its full blocks hold the same."""
    host, storage = batch.runner.host, batch.runner.storage
    place = host._place.get(row)
    if place is None or host._owners[place][1] != row.begun:
        return False
    for layer, store in enumerate(host.stores):
        for i in range(row.cached // 16):
            block, kept = row.table.blocks[i], store[place, :, 16 * i : 16 * (i + 1)]
            assert torch.equal(storage.keys_KGPD[layer][block], kept[:2])
            assert torch.equal(storage.values_KGPD[layer][block], kept[2:])
    return row.cached >= 16


def test_what_a_broken_row_left_is_not_looked_at() -> None:
    """Its place is taken by another that is shorter than its company."""
    model = tiny_model(**LLAMA_LIKE)
    batch = make_batch(model, rows=2, blocks=24)
    first, second, third = sequences(
        batch,
        ask(tuple(range(30)), max_tokens=30),
        ask(tuple(range(25)), max_tokens=30),
        ask((7,), max_tokens=15),
    )
    host = batch.runner.host
    assert host is not None
    batch.add(first)
    batch.add(second)
    with torch.inference_mode():
        while len(first.tokens) < 3:
            batch.step()
        for store in host.stores:
            store[host._place[batch.scheduler.running[1]]] = float("nan")
        while second.error is None:
            batch.step()
    batch.add(third)
    drain(batch)
    alone = make_batch(model, rows=2, blocks=24)
    (again,) = sequences(alone, ask((7,), max_tokens=15))
    alone.add(again)
    drain(alone)
    assert third.error is None and third.tokens == again.tokens


def test_a_row_that_began_again_is_copied_again() -> None:
    """As after it lost its blocks: what lay here may have been computed otherwise."""
    batch = make_batch(tiny_model(**LLAMA_LIKE), rows=2)
    (sequence,) = sequences(batch, ask(PROMPTS[1], max_tokens=30))
    host, storage = batch.runner.host, batch.runner.storage
    assert host is not None
    batch.add(sequence)
    with torch.inference_mode():
        for _ in range(3):
            batch.step()
        (row,) = batch.scheduler.running
        storage.keys_KGPD[0][row.table.blocks[0]] = 7.0
        batch.step()
        assert not (host.stores[0][0, :2, :16] == 7.0).any()
        row.begun += 1
        batch.step()
        assert (host.stores[0][0, :2, :16] == 7.0).all()
