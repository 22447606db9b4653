"""A rank that follows makes every pass that the leading one makes, over the same rows.

Both are here in one process, each with all of the model, so that they must find the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtk.parallel.groups import Group
from serving.follow import Follower
from serving.generation import Vocabulary
from serving.lead import Lead, LeadingRunner, leading_parts
from serving.paged.batch import PagedBatch, PagedSettings
from serving.paged.layers import PagedModel
from serving.paged.lookup import DraftSettings
from serving.paged.runner import Runner
from serving.sampling import SamplingParams
from tests.serving.models import LLAMA_LIKE, ByteTokenizer, tiny_model
from tests.serving.paged.running import CONTEXT, ask, drain, sequences

# Of so few ids any two have mostly been side by side before.
IDS = 8
SIZES = {**LLAMA_LIKE, "vocab_size": IDS}
# Guesses whenever there are any.
EAGER = DraftSettings(most=4, margin=0.0)
KINDS: dict[str, dict[str, Any]] = {
    "rows": {},
    "guesses": {"drafts": EAGER},
    "ahead": {"drafts": EAGER, "ahead": True},
    "blocks": {"padded": True, "drafts": EAGER},
    "few blocks": {"blocks": 7, "drafts": EAGER},
    "windows": {"window": 32},
}


class Near:
    """A connection to a follower in this process, who obeys at once."""

    def __init__(self, follower: Follower) -> None:
        self.send_bytes: Callable[[bytes], None] = follower.obey


class Pair:
    """Both runners, what each pass of theirs found, and how many rows lay on the host then; by
    whether it was of the leading one."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        group = Group("tp")
        self.follower = Follower(tiny_model(**SIZES), group)
        lead = Lead(folder, 1)
        lead._followers.append(Near(self.follower))  # type: ignore[arg-type]
        lead._listener.close()
        values = {"rows": 3, "context": CONTEXT, "blocks": 18, **settings}
        self.batch = PagedBatch(
            tiny_model(**SIZES),
            Vocabulary(ByteTokenizer(), IDS),
            PagedSettings(**values),
            runner=leading_parts(lead, group).runner,
        )
        self.found: dict[bool, list[Tensor]] = {True: [], False: []}
        self.held: dict[bool, list[int]] = {True: [], False: []}
        # Products with the matrix of the vocabulary: on several ranks all of them must take part.
        self.products = {True: 0, False: 0}

    def note(self, runner: Runner, logits_BV: Tensor | None) -> None:
        leads = isinstance(runner, LeadingRunner)
        if logits_BV is not None:
            self.found[leads].append(logits_BV.clone())
        if runner.host is not None:
            self.held[leads].append(runner.host.count)


@pytest.fixture(params=KINDS)
def pair(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Pair]:
    with torch.inference_mode():
        made = Pair(tmp_path, **KINDS[request.param])

    def broadcast(tokens: Tensor, **options: Any) -> None:
        tokens.copy_(made.batch.runner.tokens_T)

    monkeypatch.setattr("serving.follow.dist.broadcast", broadcast)
    for name in ("decode", "read"):
        monkeypatch.setattr(Runner, name, noting(made, getattr(Runner, name)))
    real = PagedModel.logits

    def logits(paged: PagedModel, x_NE: Tensor) -> Tensor:
        made.products[paged.model is not made.follower._model] += 1
        return real(paged, x_NE)

    monkeypatch.setattr(PagedModel, "logits", logits)
    yield made


def noting(pair: Pair, real: Callable[..., Any]) -> Callable[..., Any]:
    def noted(runner: Runner, given: Any) -> Any:
        launched = real(runner, given)
        pair.note(runner, None if launched is None else launched.logits_BV)
        return launched

    return noted


@torch.inference_mode()
def test_passes_are_the_same(pair: Pair) -> None:
    """Rows of any length come, end, are dropped, lose their blocks, and leave beginnings."""
    chance, batch = random.Random(3), pair.batch
    for number in range(24):
        period = chance.randint(1, 7)
        prompt = tuple(i % period for i in range(chance.randint(1, 50)))
        sampling = SamplingParams(temperature=number % 2, seed=number, top_k=4)
        wanted = {"sampling": sampling, "prompt_logprobs": number % 4 > 0}
        made = sequences(batch, ask(prompt, max_tokens=chance.randint(1, 40), **wanted))
        batch.add(made[0])
        for _ in range(chance.randint(0, 9)):
            batch.step()
        if number % 5 == 4:
            batch.remove(made.__contains__)
    drain(batch)
    assert len(pair.found[True]) > 40
    for ours, theirs in zip(pair.found[True], pair.found[False], strict=True):
        torch.testing.assert_close(theirs, ours)
    # What has ended is held by neither; the leading one frees it before it decodes.
    assert all(
        theirs <= ours for ours, theirs in zip(pair.held[True], pair.held[False], strict=True)
    )
    assert pair.products[True] == pair.products[False]
    assert (batch.scheduler.preemptions > 0) == (batch.pool.capacity < 10)
    guesses = batch.speculation
    assert guesses is None or guesses.drafted > guesses.accepted > 10
