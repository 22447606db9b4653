"""What lies on the device while sequences run, and the forward passes over it.

Every running sequence has a slot: a row of the table of its blocks, and room for its last token. A
step of decoding is told slots and positions, and where tokens lie; those it begins with need never
have been on the host. Tokens that only the host knows, as guesses are, lie behind the slots.

Shape suffixes: R slots, W columns of the table, N tokens to be read, B places of a step, one for
each row and each of its guesses, T tokens on the device, V vocabulary, E hidden size.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtk.kernels import fused_on
from mtk.kernels.transfer import send
from mtk.models.attention import form_of
from mtk.models.gpt import GPT
from serving.generation import SCORED_AT_ONCE, logprobs_of
from serving.paged.attention import Attend, DecodeAttention, PrefillAttention, Span
from serving.paged.choose import index
from serving.paged.fixed import NoAttention, WindowAttention, steady_rows
from serving.paged.graphs import BUCKETS, Graphs
from serving.paged.host_rows import HostAttention, HostRows
from serving.paged.layers import PagedModel, Tokens
from serving.paged.rotation import signed
from serving.paged.schedule import Chunk, Row
from serving.paged.storage import Storage

if TYPE_CHECKING:
    from serving.paged.kernels import Kernels


@dataclass(frozen=True)
class Launched:
    """Of some places: logits [B, V] as the model has them, and int64 [2, P], the likeliest tokens
    that may be drawn and whether all logits are finite, of the same places and maybe some that
    filled the step up. kept: whether the likeliest are in their rows' slots already."""

    logits_BV: Tensor
    found_2P: Tensor
    kept: bool = False

    @property
    def likeliest_B(self) -> Tensor:
        return self.found_2P[0, : len(self.logits_BV)]

    @property
    def finite_B(self) -> Tensor:
        return self.found_2P[1, : len(self.logits_BV)]

    def first(self, places: int) -> Launched:
        return replace(self, logits_BV=self.logits_BV[:places])


def look(logits_BV: Tensor, drawable: int) -> Launched:
    """drawable: ids that may be drawn are below it."""
    if logits_BV.is_cuda:
        lowest_B, highest_B = logits_BV.aminmax(dim=-1)
    else:
        # Both at once are many times slower on a host than one after the other.
        lowest_B, highest_B = logits_BV.amin(dim=-1), logits_BV.amax(dim=-1)
    finite_B = lowest_B.isfinite() & highest_B.isfinite()
    likeliest_B = logits_BV[:, :drawable].argmax(dim=-1)
    return Launched(logits_BV, torch.stack((likeliest_B, finite_B.long())))


class Runner:
    """slots: sequences at once. context: most tokens of one. places: most of a step with guesses.
    drawable: see :func:`look`. window: steps have fixed shapes, prompts are read in so many tokens
    (:mod:`serving.paged.fixed`). padded: run steps in few sizes, which graphs need (they are
    captured on a GPU, if ``graphs``). kernels: use those of :mod:`serving.paged.kernels` (default:
    where they can run)."""

    def __init__(
        self,
        model: GPT,
        storage: Storage,
        *,
        slots: int,
        context: int,
        drawable: int,
        places: int = 0,
        window: int | None = None,
        padded: bool = False,
        graphs: bool = False,
        kernels: bool | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        self.storage, self._drawable = storage, drawable
        self.paged = PagedModel(model, storage)
        self.device = storage.shape.device
        self._form = form_of(model.config)
        self._columns = -(-context // storage.shape.block)
        # The last slot is that of rows that fill a batch up; its table names block 0.
        self.idle_slot = slots
        self._places = max(slots, places)
        tokens = slots + 1 + self._places
        self.tokens_T = torch.zeros(tokens, dtype=torch.int64, device=self.device)
        self.table_RW = torch.zeros(slots + 1, self._columns, dtype=torch.int64, device=self.device)
        self._kernels: Kernels | None = None
        if fused_on(self.device) if kernels is None else kernels:
            self._kernels = _kernels(self.paged, context)
        self._padded = padded or graphs
        self.host: HostRows | None = None
        if self.device.type == "cpu" and self._kernels is None and not self._padded:
            self.host = HostRows(storage, apart=window is not None)
        self._window, self._steady = window, None
        if window is not None:
            vocab = model.config.vocab_size or 1
            self._steady = steady_rows(self._without_attention, slots, vocab)
        self.graphs = Graphs(self._decode, self.device, report) if graphs else None

    @property
    def fixed(self) -> bool:
        """Whether steps have fixed shapes."""
        return self._window is not None

    @property
    def model(self) -> GPT:
        return self.paged.model

    def place(self, rows: Sequence[Row]) -> None:
        """Tell the device the blocks that rows were given since."""
        entries: list[tuple[int, int, int]] = []
        for row in rows:
            assert row.slot is not None
            blocks = row.table.blocks
            if row.placed < len(blocks):
                entries += [(row.slot, i, blocks[i]) for i in range(row.placed, len(blocks))]
                row.placed = len(blocks)
        if entries:
            self.storage.reserve(max(block for _, _, block in entries))
            slots, columns, blocks_ = send(torch.tensor(entries), self.device).unbind(1)
            self.table_RW[slots, columns] = blocks_

    def ordered(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows of a step of decoding in the order in which it is cheapest."""
        return rows if self.host is None else self.host.ordered(rows)

    def decode(self, rows: Sequence[Row]) -> Launched:
        """The next token of each row, and the one after each of its guesses: a place for each.
        rows: :meth:`ordered`."""
        inputs = self._inputs(rows)
        if self.host is not None:
            return self._decode_on_host(self.host, rows, inputs)
        count, width = len(inputs), self._width(rows)
        if self._padded or self.fixed:
            inputs += [self._filler] * (self._size(count) - count)
        inputs_3B = torch.tensor(inputs, dtype=torch.int64).T.contiguous()
        guessed = any(row.draft for row in rows)
        if self.graphs is not None:
            return self.graphs(inputs_3B, width, guessed).first(count)
        return self._decode(send(inputs_3B, self.device), width, guessed).first(count)

    @property
    def _filler(self) -> tuple[int, int, int]:
        """What fills a step up."""
        return self.idle_slot, 0, self.idle_slot

    def _size(self, count: int) -> int:
        """The size that a step of so many places runs in."""
        if self._steady is not None:
            return self._steady
        most = self.idle_slot if count <= self.idle_slot else self._places
        return min(next((size for size in BUCKETS if size >= count), most), most)

    def _inputs(self, rows: Sequence[Row]) -> list[tuple[int, int, int]]:
        """Slot, position, and where the token lies, of each place. Tokens that only the host knows
        are sent."""
        inputs, sent = list[tuple[int, int, int]](), list[int]()
        for row in rows:
            assert row.slot is not None
            first = row.cached - row.width
            given = row.draft if row.told else (row.ids[-1], *row.draft)
            if row.told:
                inputs.append((row.slot, first, row.slot))
                first += 1
            for position, token in enumerate(given, first):
                inputs.append((row.slot, position, self.idle_slot + 1 + len(sent)))
                sent.append(token)
        if sent:
            start = self.idle_slot + 1
            self.tokens_T[start : start + len(sent)] = send(torch.tensor(sent), self.device)
        return inputs

    def _decode_on_host(
        self, host: HostRows, rows: Sequence[Row], inputs: Sequence[tuple[int, int, int]]
    ) -> Launched:
        step = host.begin(rows)
        count = len(inputs)
        if self.fixed:
            inputs = [*inputs, *[self._filler] * (self._size(count) - count)]
        slots_B, positions_B, places_B = torch.tensor(inputs).T.contiguous().unbind(0)
        tokens = self._tokens(self.tokens_T[places_B], slots_B, positions_B)
        attend = HostAttention(host, step, self._rotary(tokens), self._form.window)
        launched = self._look(self.paged.logits(self.paged.states(tokens, attend)))
        host.keep_full(rows)
        return launched.first(count)

    def _rotary(self, tokens: Tokens) -> tuple[Tensor, Tensor] | None:
        if tokens.rotary is None:
            return None
        cos, sin = (table.to(self.storage.shape.dtype) for table in tokens.rotary)
        return cos, signed(sin, interleaved=self.model.config.rotary_interleaved)

    def _width(self, rows: Sequence[Row]) -> int:
        """Columns of the table that this step looks at; kernels find out themselves."""
        if self._kernels is not None or self._window is not None:
            return self._columns
        needed = max(len(row.table.blocks) for row in rows)
        return min(1 << (needed - 1).bit_length(), self._columns) if self._padded else needed

    def _decode(self, inputs_3B: Tensor, width: int, guessed: bool) -> Launched:
        slots_B, positions_B, places_B = inputs_3B.unbind(0)
        tokens = self._tokens(self.tokens_T[places_B], slots_B, positions_B)
        window = self._form.window
        if self._kernels is not None:
            logits_BV = self._kernels.logits(tokens, window, guessed=guessed)
            # Which of a row's guesses are right, and so what its last token is, the host finds out.
            keep = None if guessed else (slots_B, self.tokens_T)
            found_2B = self._kernels.look(logits_BV, self._drawable, keep)
            return Launched(logits_BV, found_2B, kept=not guessed)
        table_BW = self.table_RW[tokens.slots_N, :width]
        attend = DecodeAttention(self.storage, table_BW, tokens.positions_N + 1, window)
        return self._look(self.paged.logits(self.paged.states(tokens, attend)))

    def _tokens(self, ids_N: Tensor, slots_N: Tensor, positions_N: Tensor) -> Tokens:
        block = self.storage.shape.block
        return Tokens(ids_N, slots_N, positions_N, self.table_RW, block, self.paged.tables)

    def _look(self, logits_BV: Tensor) -> Launched:
        if self._kernels is None:
            return look(logits_BV, self._drawable)
        return Launched(logits_BV, self._kernels.look(logits_BV, self._drawable))

    def read(self, chunks: Sequence[Chunk]) -> Launched | None:
        """Read chunks of text; what follows those that are the last of their rows, if any.

        Log-probabilities that rows want of their prompts are added to them. chunks: one of
        :meth:`passes`.
        """
        if self._window is not None:
            return self._read_window(chunks[0], self._window)
        tokens = self._tokens(*send(_columns(chunks), self.device).unbind(0))
        attend = self._prefill(tokens, [self._span(chunk) for chunk in chunks])
        x_NE = self.paged.states(tokens, attend)
        ends, done = [], 0
        for chunk in chunks:
            self._score(chunk, x_NE[done : done + chunk.count])
            done += chunk.count
            ends += [done - 1] * chunk.last
        if not ends:
            return None
        return self._look(self.paged.logits(x_NE[index(ends, self.device)]))

    def _prefill(self, tokens: Tokens, spans: Sequence[Span]) -> Attend:
        if self._kernels is not None:
            return self._kernels.prefill(tokens, spans, self._form)
        return PrefillAttention(self.storage, spans, self._form)

    def passes(self, chunks: Sequence[Chunk]) -> Sequence[Sequence[Chunk]]:
        """Which of a step's chunks are read at once."""
        if self._window is not None:
            return [[chunk] for chunk in chunks]
        return [chunks] if chunks else []

    def _read_window(self, chunk: Chunk, window: int) -> Launched | None:
        """The window around a chunk, in which each token has its place."""
        row, end = chunk.row, chunk.start + chunk.count
        begin, slot = chunk.start // window * window, row.slot
        assert slot is not None and end <= begin + window
        filler = (0, self.idle_slot, 0)
        columns = [
            (row.ids[i], slot, i) if chunk.start <= i < end else filler
            for i in range(begin, begin + window)
        ]
        tokens = self._tokens(*send(torch.tensor(columns), self.device).T.contiguous().unbind(0))
        needed = -(-(begin + window) // self.storage.shape.block)
        blocks_W = self.table_RW.new_zeros(needed)
        given_W = self.table_RW[slot, :needed]
        blocks_W[: len(given_W)] = given_W
        attend = WindowAttention(self.storage, blocks_W, begin, end, self._form)
        x_NE = self.paged.states(tokens, attend)
        self._score(chunk, x_NE[chunk.start - begin : end - begin])
        if not chunk.last:
            return None
        return self._look(self.paged.logits(x_NE[end - begin - 1 : end - begin]))

    def _without_attention(self, ids_S: Tensor) -> Tensor:
        """Logits of tokens that look at nothing."""
        ids_S = ids_S.to(self.device)
        tokens = self._tokens(ids_S, torch.full_like(ids_S, self.idle_slot), ids_S * 0)
        return self.paged.logits(self.paged.states(tokens, NoAttention()))

    def _span(self, chunk: Chunk) -> Span:
        blocks = -(-(chunk.start + chunk.count) // self.storage.shape.block)
        return Span(chunk.start, chunk.count, self.table_RW[chunk.row.slot, :blocks])

    def _score(self, chunk: Chunk, x_SE: Tensor) -> None:
        row = chunk.row
        top = row.sequence.score_top
        if top is None or row.sequence.tokens:
            return
        # The last token of the prompt predicts none of its tokens.
        count = min(chunk.count, len(row.ids) - 1 - chunk.start)
        for start in range(0, count, SCORED_AT_ONCE):
            end = min(start + SCORED_AT_ONCE, count)
            following = row.ids[chunk.start + start + 1 : chunk.start + end + 1]
            row.scored += logprobs_of(self.paged.logits(x_SE[start:end]), following, top)

    def capture(self) -> None:
        """Capture the graphs of all sizes before there is traffic, if the tokens that sequences
        have do not matter to them."""
        if self.graphs is None or self._kernels is None:
            return
        for size in sorted({self._size(count) for count in range(1, self._places + 1)}):
            idle = [[self.idle_slot] * size, [0] * size, [self.idle_slot] * size]
            # Of steps with guesses those that are larger than any without.
            guessed = size > self.idle_slot
            self.graphs(torch.tensor(idle), self._columns, guessed)


def _columns(chunks: Sequence[Chunk]) -> Tensor:
    """int64 [3, N] on the host: ids, slots and positions of the chunks' tokens."""
    spans = [(chunk.start, chunk.start + chunk.count) for chunk in chunks]
    pairs = list(zip(chunks, spans, strict=True))
    texts = chain.from_iterable(chunk.row.ids[a:b] for chunk, (a, b) in pairs)
    # Several times as fast as a tensor of a list.
    ids = torch.frombuffer(array("q", texts), dtype=torch.int64)
    slots = torch.cat([torch.full((chunk.count,), chunk.row.slot or 0) for chunk in chunks])
    return torch.stack((ids, slots, torch.cat([torch.arange(a, b) for a, b in spans])))


def _kernels(paged: PagedModel, context: int) -> Kernels:
    # Triton is not everywhere.
    from serving.paged.kernels import Kernels

    return Kernels(paged, context)
