"""Tensor parallelism in serving, on the rank that leads: it alone schedules, chooses tokens and
answers; before each forward pass it tells the other ranks what to compute.

What a pass reads is told over sockets of this machine, as plain numbers: an engine without work
then waits in no collective, whose time would run out. Tokens that were chosen on the device go to
the other ranks' devices in a broadcast. How ranks share matrices: :mod:`mtk.parallel.tensor`.
"""

from __future__ import annotations

import itertools
import pickle
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch import Tensor

from mtk.models.gpt import GPT
from mtk.parallel.groups import Group
from serving.engine_messages import listen
from serving.engine_parts import Parts
from serving.follow import STEPS, SharedRunner, ToldRow
from serving.generation import Decoder
from serving.kv_cache import KVCache
from serving.paged.runner import Launched
from serving.paged.schedule import Chunk, Row
from serving.requests import TokenLogprob


class Lead:
    """Tells ``count`` followers, in the order of the collectives that then happen. Of one thread
    at a time. Listens in ``folder`` from the start, so that followers that have met this rank find
    it."""

    def __init__(self, folder: Path, count: int) -> None:
        self._listener = listen(folder, STEPS)
        self._count = count
        self._followers: list[Connection] = []
        self._names = itertools.count()
        self._dropped: deque[int] = deque()

    def gather(self, timeout: float) -> None:
        """Wait for the followers. Raises TimeoutError."""
        self._listener.settimeout(timeout)
        with self._listener:
            while len(self._followers) < self._count:
                theirs, _ = self._listener.accept()
                theirs.setblocking(True)
                self._followers.append(Connection(theirs.detach()))

    def tell(self, do: str, *values: Any) -> None:
        """Let followers call ``do``. Raises OSError when one is gone."""
        dropped = []
        with suppress(IndexError):
            while True:
                dropped.append(self._dropped.popleft())
        content = pickle.dumps((do, values, dropped), protocol=pickle.HIGHEST_PROTOCOL)
        for follower in self._followers:
            follower.send_bytes(content)

    def name(self, owner: object) -> int:
        """A number for what followers keep as long as ``owner`` lives."""
        number = next(self._names)
        weakref.finalize(owner, self._dropped.append, number)
        return number

    def close(self) -> None:
        """Let the followers go."""
        for follower in self._followers:
            follower.close()


class LeadingRunner(SharedRunner):
    """A runner whose passes the followers make too."""

    lead: Lead

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        # Rows by the slots that followers know them by, and how often they had begun then.
        self._placed: dict[int, tuple[Row, int]] = {}

    def place(self, rows: Sequence[Row]) -> None:
        self._free_ended()
        told = [
            (row.slot, row.placed, row.table.blocks[row.placed :])
            for row in rows
            if row.placed < len(row.table.blocks)
        ]
        if told:
            self.lead.tell("place", told)
        self._placed |= {row.slot: (row, row.begun) for row in rows if row.slot is not None}
        super().place(rows)

    def _free_ended(self) -> None:
        ended = [
            slot
            for slot, (row, begun) in self._placed.items()
            if row.slot != slot or row.begun != begun
        ]
        if ended:
            self.lead.tell("free", ended)
        for slot in ended:
            del self._placed[slot]

    def decode(self, rows: Sequence[Row]) -> Launched:
        self.lead.tell("decode", [_told(row) for row in rows])
        return super().decode(rows)

    def read(self, chunks: Sequence[Chunk]) -> Launched | None:
        self.lead.tell("read", [_plain(chunk) for chunk in chunks])
        return super().read(chunks)

    def capture(self) -> None:
        self.lead.tell("capture")
        super().capture()


def _told(row: Row) -> ToldRow:
    assert row.slot is not None
    return row.slot, row.cached, None if row.told else row.ids[-1], row.draft


def _plain(chunk: Chunk) -> tuple[Any, ...]:
    """slot, start, count, last, ids with the one behind, all ids' number, what is scored."""
    row, start, end = chunk.row, chunk.start, chunk.start + chunk.count
    scores = None if row.sequence.tokens else row.sequence.score_top
    ids = row.ids[start : end + 1]
    return row.slot, start, chunk.count, chunk.last, ids, len(row.ids), scores


class LeadingDecoder(Decoder):
    """A decoder on dense caches whose passes the followers make too."""

    def __init__(self, model: GPT, lead: Lead) -> None:
        super().__init__(model)
        self._lead, self._name = lead, lead.name(self)
        lead.tell("make_decoder", self._name)
        self.cache = LeadingCache(len(model.layers), model.stateful_layers)
        # Not a method: a cycle would keep the decoder alive for longer.
        self.cache.told = partial(lead.tell, "cache", self._name)

    def prefill(
        self, row: int, prompt: Sequence[int], *, score_top: int | None = None
    ) -> tuple[Tensor, list[TokenLogprob]]:
        self._lead.tell("prefill", self._name, row, list(prompt), score_top)
        return super().prefill(row, prompt, score_top=score_top)

    def decode(self, tokens: Sequence[int]) -> Tensor:
        self._lead.tell("decode_dense", self._name, list(tokens))
        return super().decode(tokens)


class LeadingCache(KVCache):
    """Rows that followers add, free and copy too."""

    told: Callable[..., None]

    def add_row(self) -> int:
        self.told("add_row")
        return super().add_row()

    def free_row(self, row: int) -> int:
        self.told("free_row", row)
        return super().free_row(row)

    def select_rows(self, rows: Sequence[int]) -> None:
        self.told("select_rows", list(rows))
        super().select_rows(rows)


def leading_parts(lead: Lead, group: Group) -> Parts:
    """What an engine computes with on the rank that leads ``group``."""

    def runner(*given: Any, report: Callable[[str], None], **options: Any) -> LeadingRunner:
        model, storage = given
        lead.tell("make_runner", storage.capacity, options)
        made = LeadingRunner(model, storage, report=report, **options)
        made.group, made.lead = group, lead
        return made

    return Parts(lambda model, encoder: LeadingDecoder(model, lead), runner)
