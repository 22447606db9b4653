"""Tokens of a step: chosen on the device, put where the next step finds them, and sent to the host
in one copy that is looked at later.

Shape suffixes: B places, one for each row and each of its guesses, V vocabulary, L places that
want log-probabilities, K alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from serving.generation import Vocabulary
from serving.paged.choose import draw, index
from serving.paged.runner import Launched, Runner
from serving.paged.schedule import Row
from serving.requests import TokenLogprob
from serving.sampling import GREEDY, Choice


class Found(NamedTuple):
    """Of one row. token: None if its logits were not finite."""

    token: int | None
    logprobs: tuple[TokenLogprob, ...] = ()


class Pending:
    """Results on their way to the host."""

    def __init__(
        self, rows: Sequence[Row], packed_2P: Tensor, scored: _Scored | None = None
    ) -> None:
        """packed: tokens of all places and whether their logits are finite; more may follow."""
        self.rows, self._widths = rows, [row.width for row in rows]
        self._host_2P = _to_host(packed_2P)
        self._scored = scored
        self._event: Any = None
        if packed_2P.is_cuda:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> list[list[Found]]:
        """Of each row what its tokens are, one after the other. Waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
        tokens, finite = self._host_2P.tolist()
        if self._scored is None:
            found = (Found(t if sound else None) for t, sound in zip(tokens, finite, strict=True))
            return [list(islice(found, width)) for width in self._widths]
        logprobs = self._scored.read(tokens)
        found = (
            Found(token if sound else None, logprobs.get(place, ()))
            for place, (token, sound) in enumerate(zip(tokens, finite, strict=True))
        )
        return [list(islice(found, width)) for width in self._widths]


@dataclass(frozen=True)
class _Scored:
    """Log-probabilities of chosen tokens and the likeliest, of some places. tops: how many each
    of them wants."""

    places: Sequence[int]
    tops: Sequence[int]
    chosen_L: Tensor
    ids_LK: Tensor
    values_LK: Tensor

    def read(self, tokens: Sequence[int]) -> dict[int, tuple[TokenLogprob, ...]]:
        lists = (self.chosen_L.tolist(), self.ids_LK.tolist(), self.values_LK.tolist())
        found: dict[int, tuple[TokenLogprob, ...]] = {}
        for place, top, chosen, ids, values in zip(self.places, self.tops, *lists, strict=True):
            likeliest = tuple(zip(ids[:top], values[:top], strict=True))
            found[place] = (TokenLogprob(tokens[place], chosen, likeliest),)
        return found


def _to_host(x: Tensor) -> Tensor:
    return x.to("cpu", non_blocking=True)


def choose_next(
    launched: Launched, rows: Sequence[Row], runner: Runner, vocabulary: Vocabulary
) -> Pending:
    """Choose each row's token, leave it in the row's slot and send it to the host; of a row with
    guesses choose one for each place, and let the host find out which is its last."""
    if launched.kept and all(row.sequence.plain for row in rows):
        for row in rows:
            row.told = True
        return Pending(rows, launched.found_2P)
    device = launched.logits_BV.device
    # Of each place the row, and how it chooses.
    places = [row for row in rows for _ in range(row.width)]
    choices = [choice for row in rows for choice in _choices(row)]
    allowed_BV, tokens_B = launched.logits_BV[:, : vocabulary.size], launched.likeliest_B
    forbid = [i for i, row in enumerate(places) if row.sequence.forbids_newline]
    if forbid:
        allowed_BV = allowed_BV.clone()
        at = index(forbid, device)[:, None]
        allowed_BV[at, vocabulary.newlines(device)] = float("-inf")
        tokens_B = allowed_BV.argmax(dim=-1)
    guided = [i for i, row in enumerate(places) if row.sequence.guided]
    if guided:
        # In fp32: a bias must not be rounded to the precision of the model.
        allowed_BV = allowed_BV.float().clone()
        for i in guided:
            allowed_BV[i] = places[i].sequence.guide(allowed_BV[i])
        tokens_B = allowed_BV.argmax(dim=-1)
    drawn = [i for i, choice in enumerate(choices) if not choice.greedy]
    if drawn:
        # Sums over a row may be split up by how many rows there are.
        for part in [[i] for i in drawn] if runner.fixed else [drawn]:
            at = index(part, device)
            picked = draw(allowed_BV.index_select(0, at), [choices[i] for i in part])
            tokens_B = tokens_B.index_copy(0, at, picked)
    _keep(tokens_B, places, runner)
    scored = _score(launched.logits_BV, tokens_B, places)
    return Pending(rows, torch.stack((tokens_B, launched.finite_B)), scored)


def _choices(row: Row) -> list[Choice]:
    return row.draw() if row.sequence.request.max_tokens else [GREEDY]


def _keep(tokens_B: Tensor, places: Sequence[Row], runner: Runner) -> None:
    """Leave the tokens of rows that have a single one in their slots."""
    single = [place for place, row in enumerate(places) if not row.draft]
    if len(single) < len(places):
        tokens_B = tokens_B.index_select(0, index(single, tokens_B.device))
    slots = [row.slot for row in places if not row.draft and row.slot is not None]
    if slots:
        runner.tokens_T.index_copy_(0, index(slots, tokens_B.device), tokens_B)
    for row in places:
        row.told = not row.draft


def _score(logits_BV: Tensor, tokens_B: Tensor, places: Sequence[Row]) -> _Scored | None:
    wanted = [(i, r.sequence.request.sampling.logprobs) for i, r in enumerate(places)]
    tops = {i: top for i, top in wanted if top is not None}
    if not tops:
        return None
    at = index(list(tops), logits_BV.device)
    values_LV = logits_BV.index_select(0, at).float().log_softmax(dim=-1)
    chosen_L = values_LV.gather(1, tokens_B.index_select(0, at)[:, None])[:, 0]
    best = values_LV.topk(min(max(tops.values()), values_LV.shape[-1]), dim=-1)
    found = (_to_host(chosen_L), _to_host(best.indices), _to_host(best.values))
    return _Scored(list(tops), list(tops.values()), *found)
