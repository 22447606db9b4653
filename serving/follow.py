"""Tensor parallelism in serving, on the ranks that follow: the same forward passes over this rank's
part of the model, as :mod:`serving.lead` tells them.

Rows of a batch are known here by their slots: which blocks they have, and no more of their
sequences than a pass reads.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtk.models.gpt import GPT
from mtk.parallel.groups import Group
from serving.engine_messages import open_connection
from serving.generation import Decoder
from serving.paged.layers import cache_shape
from serving.paged.runner import Launched, Runner
from serving.paged.schedule import Row
from serving.paged.storage import Storage

# Of the socket, in the folder of the job.
STEPS = "steps"

# Of a row to decode: slot, tokens cached, its last token if only the host has it, guesses.
ToldRow = tuple[int, int, int | None, tuple[int, ...]]


class SharedRunner(Runner):
    """Begins each step of decoding with the tokens that the first rank of ``group`` chose."""

    group: Group

    def decode(self, rows: Sequence[Row]) -> Launched:
        self.group.trace.enter("tp.tokens", self.group.name)
        dist.broadcast(self.tokens_T, src=self.group.ranks[0], group=self.group.handle)
        self.group.trace.leave()
        return super().decode(rows)


@dataclass
class _Blocks:
    blocks: list[int] = field(default_factory=list)


@dataclass
class _Sequence:
    """What a pass asks of a sequence. tokens: truthy once it has some."""

    score_top: int | None = None
    tokens: tuple[int, ...] = ()


@dataclass(eq=False)
class _Row:
    """Stands in for :class:`serving.paged.schedule.Row`, for as long as that has its slot."""

    slot: int | None
    table: _Blocks = field(default_factory=_Blocks)
    sequence: _Sequence = field(default_factory=_Sequence)
    ids: list[int] = field(default_factory=list)
    cached: int = 0
    placed: int = 0
    begun: int = 1
    told: bool = True
    draft: tuple[int, ...] = ()
    scored: list[Any] = field(default_factory=list)

    @property
    def width(self) -> int:
        return 1 + len(self.draft)


@dataclass
class _Chunk:
    row: _Row
    start: int
    count: int
    last: bool


class Follower:
    """Does what it is told."""

    def __init__(self, model: GPT, group: Group) -> None:
        self._model, self._group = model, group
        self._rows: dict[int, _Row] = {}
        self._decoders: dict[int, Decoder] = {}
        self._runner: SharedRunner | None = None

    def follow(self, folder: Path) -> None:
        """Do what is told in ``folder``, until who leads is gone."""
        connection = open_connection(folder, STEPS)
        while True:
            try:
                told = connection.recv_bytes()
            except (EOFError, OSError):
                return
            self.obey(told)

    @torch.inference_mode()
    def obey(self, told: bytes) -> None:
        """told: what :meth:`serving.lead.Lead.tell` sends."""
        do, values, dropped = pickle.loads(told)
        for number in dropped:
            self._decoders.pop(number, None)
        act: Callable[..., None] = getattr(self, f"_{do}")
        act(*values)

    @property
    def runner(self) -> SharedRunner:
        assert self._runner is not None
        return self._runner

    def _make_runner(self, capacity: int, options: dict[str, Any]) -> None:
        storage = Storage(cache_shape(self._model), capacity)
        self._runner = SharedRunner(self._model, storage, report=lambda text: None, **options)
        self._runner.group = self._group

    def _capture(self) -> None:
        self.runner.capture()

    def _place(self, told: Sequence[tuple[int, int, list[int]]]) -> None:
        rows = []
        for slot, placed, blocks in told:
            # A row that has nothing placed is new in its slot.
            row = self._rows[slot] if placed else _Row(slot)
            row.table.blocks[placed:] = blocks
            row.placed = placed
            self._rows[slot] = row
            rows.append(row)
        self.runner.place(rows)  # type: ignore[arg-type]

    def _free(self, slots: Sequence[int]) -> None:
        """Rows have lost their slots."""
        for slot in slots:
            self._rows.pop(slot).slot = None
        # Where rows lie is this rank's own matter; the order of a step is the first rank's.
        self.runner.ordered([])

    def _decode(self, told: Sequence[ToldRow]) -> None:
        rows = []
        for slot, cached, last, draft in told:
            row = self._rows[slot]
            row.cached, row.draft = cached, draft
            row.told = last is None
            if last is not None:
                row.ids = [last]
            rows.append(row)
        self.runner.decode(rows)  # type: ignore[arg-type]

    def _read(self, told: Sequence[tuple[Any, ...]]) -> None:
        self.runner.read([self._chunk(*values) for values in told])  # type: ignore[misc]

    def _chunk(
        self,
        slot: int,
        start: int,
        count: int,
        last: bool,
        ids: list[int],
        length: int,
        scores: int | None,
    ) -> _Chunk:
        row = self._rows[slot]
        row.ids = [0] * start + ids + [0] * (length - start - len(ids))
        row.sequence = _Sequence(scores)
        row.scored = []
        return _Chunk(row, start, count, last)

    def _make_decoder(self, number: int) -> None:
        self._decoders[number] = Decoder(self._model)

    def _cache(self, number: int, do: str, *values: Any) -> None:
        getattr(self._decoders[number].cache, do)(*values)

    def _prefill(self, number: int, row: int, prompt: list[int], score_top: int | None) -> None:
        self._decoders[number].prefill(row, prompt, score_top=score_top)

    def _decode_dense(self, number: int, tokens: list[int]) -> None:
        self._decoders[number].decode(tokens)
