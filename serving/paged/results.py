"""Tokens of a step: chosen on the device, put where the next step finds them, and sent to the host
in one copy that is looked at later.

Shape suffixes: B rows, V vocabulary, L rows that want log-probabilities, K alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from serving.generation import Vocabulary
from serving.paged.choose import draw, index
from serving.paged.runner import Launched, Runner
from serving.paged.schedule import Row
from serving.requests import TokenLogprob
from serving.sampling import GREEDY


@dataclass(frozen=True)
class Found:
    """Of one row. token: None if its logits were not finite."""

    token: int | None
    logprobs: tuple[TokenLogprob, ...] = ()


class Pending:
    """Results on their way to the host."""

    def __init__(
        self, rows: Sequence[Row], tokens_B: Tensor, launched: Launched, scored: _Scored | None
    ) -> None:
        self.rows = rows
        packed_2B = torch.stack((tokens_B, launched.finite_B.long()))
        self._host_2B = _to_host(packed_2B)
        self._scored = scored
        self._event: Any = None
        if packed_2B.is_cuda:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> list[Found]:
        """Waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
        tokens, finite = self._host_2B.tolist()
        logprobs = {} if self._scored is None else self._scored.read(tokens)
        return [
            Found(token if sound else None, logprobs.get(row, ()))
            for row, (token, sound) in enumerate(zip(tokens, finite, strict=True))
        ]


@dataclass(frozen=True)
class _Scored:
    """Log-probabilities of chosen tokens and the likeliest, of some rows. tops: how many each
    of them wants."""

    rows: Sequence[int]
    tops: Sequence[int]
    chosen_L: Tensor
    ids_LK: Tensor
    values_LK: Tensor

    def read(self, tokens: Sequence[int]) -> dict[int, tuple[TokenLogprob, ...]]:
        lists = (self.chosen_L.tolist(), self.ids_LK.tolist(), self.values_LK.tolist())
        found: dict[int, tuple[TokenLogprob, ...]] = {}
        for row, top, chosen, ids, values in zip(self.rows, self.tops, *lists, strict=True):
            likeliest = tuple(zip(ids[:top], values[:top], strict=True))
            found[row] = (TokenLogprob(tokens[row], chosen, likeliest),)
        return found


def _to_host(x: Tensor) -> Tensor:
    return x.to("cpu", non_blocking=True)


def choose_next(
    launched: Launched, rows: Sequence[Row], runner: Runner, vocabulary: Vocabulary
) -> Pending:
    """Choose each row's token, leave it in the row's slot and send it to the host."""
    device = launched.logits_BV.device
    choices = [r.sequence.next_choice() if r.sequence.request.max_tokens else GREEDY for r in rows]
    allowed_BV, tokens_B = launched.logits_BV[:, : vocabulary.size], launched.likeliest_B
    forbid = [i for i, row in enumerate(rows) if row.sequence.forbids_newline]
    if forbid:
        allowed_BV = allowed_BV.clone()
        at = index(forbid, device)[:, None]
        allowed_BV[at, vocabulary.newlines(device)] = float("-inf")
        tokens_B = allowed_BV.argmax(dim=-1)
    guided = [i for i, row in enumerate(rows) if row.sequence.guided]
    if guided:
        # In fp32: a bias must not be rounded to the precision of the model.
        allowed_BV = allowed_BV.float().clone()
        for i in guided:
            allowed_BV[i] = rows[i].sequence.guide(allowed_BV[i])
        tokens_B = allowed_BV.argmax(dim=-1)
    drawn = [i for i, choice in enumerate(choices) if not choice.greedy]
    if drawn:
        # Sums over a row may be split up by how many rows there are.
        for part in [[i] for i in drawn] if runner.fixed else [drawn]:
            at = index(part, device)
            picked = draw(allowed_BV.index_select(0, at), [choices[i] for i in part])
            tokens_B = tokens_B.index_copy(0, at, picked)
    slots = [row.slot for row in rows if row.slot is not None]
    runner.tokens_R.index_copy_(0, index(slots, device), tokens_B)
    scored = _score(launched.logits_BV, tokens_B, rows)
    return Pending(rows, tokens_B, launched, scored)


def _score(logits_BV: Tensor, tokens_B: Tensor, rows: Sequence[Row]) -> _Scored | None:
    wanted = [(i, r.sequence.request.sampling.logprobs) for i, r in enumerate(rows)]
    tops = {i: top for i, top in wanted if top is not None}
    if not tops:
        return None
    at = index(list(tops), logits_BV.device)
    values_LV = logits_BV.index_select(0, at).float().log_softmax(dim=-1)
    chosen_L = values_LV.gather(1, tokens_B.index_select(0, at)[:, None])[:, 0]
    best = values_LV.topk(min(max(tops.values()), values_LV.shape[-1]), dim=-1)
    found = (_to_host(chosen_L), _to_host(best.indices), _to_host(best.values))
    return _Scored(list(tops), list(tops.values()), *found)
