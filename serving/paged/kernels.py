"""What lies between a layer's projections, with the kernels of :mod:`mtk.kernels`. Needs Triton.

They compute what :class:`serving.paged.attention.DecodeAttention` and
:class:`serving.paged.attention.PrefillAttention` do around and in attention, in fewer launches.

Shape suffixes: N tokens, B rows, H query heads, G key/value heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mtk.kernels.decode_attention import decode_attention
from mtk.kernels.few_rows import Workspace
from mtk.kernels.gated import silu_product
from mtk.kernels.heads import HeadForm, Rows, turn_and_store
from mtk.kernels.look import look_at
from mtk.models.attention import Attention, Form
from mtk.models.mlp import ACTIVATIONS
from serving.paged.attention import PrefillAttention, Span
from serving.paged.fused import Steps, rms_norm
from serving.paged.layers import GatedMLP, PagedModel, Tokens
from serving.paged.row_product import use_kernels
from serving.paged.spans import FlashSpans
from serving.paged.storage import Storage


@dataclass(frozen=True)
class KernelAttention:
    """One new token a place, whose blocks are read where they are. tables: cosines and sines of
    all positions, if the model rotates. guessed: several places may be of one sequence, of which
    each sees those before it."""

    storage: Storage
    rows: Rows
    workspace: Workspace
    window: int | None
    tables: tuple[Tensor, Tensor] | None
    guessed: bool

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        qkv = torch.cat((q_NHD, k_NGD, v_NGD), dim=1).flatten(1)
        return self._attend(layer, qkv, HeadForm(), early=False)

    def whole(self, layer: int, own: Attention, qkv: Tensor) -> Tensor | None:
        """All between the projections, if the layer's norms there are known: [B, H, D]."""
        form = head_form(own, self.tables)
        if form is None:
            return None
        if self.guessed:
            keys, values = self.storage.keys_KGPD[layer], self.storage.values_KGPD[layer]
            return self(layer, *turn_and_store(qkv, keys, values, self.rows, form))
        return self._attend(layer, qkv, form, early=True)

    def _attend(self, layer: int, qkv: Tensor, form: HeadForm, *, early: bool) -> Tensor:
        keys, values = self.storage.keys_KGPD[layer], self.storage.values_KGPD[layer]
        return decode_attention(
            qkv, keys, values, self.rows, self.workspace, form, self.window, early=early
        )


@dataclass(frozen=True, eq=False)
class KernelPrefill:
    """Spans of several sequences; heads are made ready by one kernel."""

    storage: Storage
    rows: Rows
    spans: Sequence[Span]
    form: Form
    tables: tuple[Tensor, Tensor] | None

    @cached_property
    def _flash(self) -> FlashSpans:
        return FlashSpans(self.spans, self.form, self.storage.shape.block)

    @cached_property
    def _plain(self) -> PrefillAttention:
        return PrefillAttention(self.storage, self.spans, self.form)

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        plain = self._plain
        if plain.alike or not flash_able(q_NHD):
            return plain(layer, q_NHD, k_NGD, v_NGD)
        keys, values = self.storage.keys_KGPD[layer], self.storage.values_KGPD[layer]
        return self._flash(q_NHD, k_NGD, v_NGD, keys, values)

    def whole(self, layer: int, own: Attention, qkv: Tensor) -> Tensor | None:
        form = head_form(own, self.tables)
        if form is None:
            return None
        keys, values = self.storage.keys_KGPD[layer], self.storage.values_KGPD[layer]
        return self(layer, *turn_and_store(qkv, keys, values, self.rows, form))


def head_form(own: Attention, tables: tuple[Tensor, Tensor] | None) -> HeadForm | None:
    """What ``own`` does to heads; None if kernels do not know its norms."""
    norms = None
    if own.query_norm is not None and own.key_norm is not None:
        query, key = rms_norm(own.query_norm), rms_norm(own.key_norm)
        if query is None or key is None or query[1] != key[1]:
            return None
        norms = (query[0], key[0], query[1])
    scale = 1.0 if own.query_scale is None else own.query_scale
    return HeadForm(tables, norms, own.interleaved, scale)


def flash_able(x: Tensor) -> bool:
    """Whether torch's flash attention takes heads like ``x``."""
    size = x.shape[-1]
    return x.is_cuda and x.dtype != torch.float32 and size % 8 == 0 and size <= 256


class Kernels:
    """Of a model whose sequences have at most ``context`` tokens."""

    def __init__(self, paged: PagedModel, context: int) -> None:
        self._paged, self._context = paged, context
        device = paged.storage.shape.device
        self.workspace = Workspace(device)
        use_kernels(paged)
        for block in paged.blocks:
            mlp = block.mlp
            if isinstance(mlp, GatedMLP) and mlp.activation is ACTIVATIONS["swiglu"]:
                mlp.join = silu_product
        self._steps = Steps(paged, self.workspace)

    def logits(self, tokens: Tokens, window: int | None, *, guessed: bool) -> Tensor:
        """[B, V] after one new token of each place. guessed: see :class:`KernelAttention`."""
        rows, tables = self._rows(tokens), self._paged.tables
        storage, workspace = self._paged.storage, self.workspace
        attend = KernelAttention(storage, rows, workspace, window, tables, guessed)
        return self._steps.logits(tokens, attend)

    def prefill(self, tokens: Tokens, spans: Sequence[Span], form: Form) -> KernelPrefill:
        rows, tables = self._rows(tokens), self._paged.tables
        return KernelPrefill(self._paged.storage, rows, spans, form, tables)

    def look(
        self, logits_BV: Tensor, drawable: int, keep: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """See :func:`mtk.kernels.look.look_at`."""
        return look_at(logits_BV, drawable, self.workspace, keep)

    def _rows(self, tokens: Tokens) -> Rows:
        return Rows(tokens.slots_N, tokens.positions_N, tokens.table_RW, self._context)
