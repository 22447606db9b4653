"""Steps of decoding with the kernels of :mod:`mtk.kernels`. Needs Triton.

They compute what :class:`serving.paged.attention.DecodeAttention` and the layers' own modules do,
in fewer launches.

Shape suffixes: B rows, E hidden size, H query heads, G key/value heads, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from mtk.kernels.gated import silu_product
from mtk.kernels.gemv import gemv
from mtk.kernels.paged_attention import Rows, attend_rows, rotate_and_store
from mtk.models.attention import Attention
from mtk.models.gpt import GPT, OutputHead
from mtk.models.mlp import ACTIVATIONS
from serving.paged.layers import GatedMLP, Leave, PagedBlock, PagedModel, Part, Tokens
from serving.paged.storage import Storage


@dataclass(frozen=True)
class KernelAttention:
    """One new token a sequence, whose blocks are read where they are. tables: cosines and sines of
    all positions, if the model rotates."""

    storage: Storage
    rows: Rows
    window: int | None
    tables: tuple[Tensor, Tensor] | None

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        keys, values = self.storage.keys_KGPD[layer], self.storage.values_KGPD[layer]
        return attend_rows(q_NHD.contiguous(), keys, values, self.rows, self.window)

    def whole(self, layer: int, own: Attention, qkv: Tensor) -> Tensor | None:
        """All between the projections, if the layer has no norms there: [B, H, D]."""
        if own.query_norm is not None or own.key_norm is not None:
            return None
        keys, values = self.storage.keys_KGPD[layer], self.storage.values_KGPD[layer]
        q_BHD = rotate_and_store(
            qkv,
            self.tables,
            keys,
            values,
            self.rows,
            query_scale=1.0 if own.query_scale is None else own.query_scale,
            interleaved=own.interleaved,
        )
        return attend_rows(q_BHD, keys, values, self.rows, self.window)


class Kernels:
    """Of a model whose sequences have at most ``context`` tokens; steps of one row then run on
    kernels as far as they can."""

    def __init__(self, paged: PagedModel, context: int) -> None:
        self._paged, self._context = paged, context
        fuse(paged)

    def attention(self, tokens: Tokens, window: int | None) -> KernelAttention:
        rows = Rows(tokens.slots_N, tokens.positions_N, tokens.table_RW, self._context)
        return KernelAttention(self._paged.storage, rows, window, self._paged.tables)


def fuse(paged: PagedModel) -> int:
    """Let layers use kernels as far as they can, and :func:`mtk.kernels.gemv.gemv` where a step has
    one row; how many do the latter."""
    fused = 0
    for block in paged.blocks:
        mlp = block.mlp
        if isinstance(mlp, GatedMLP) and mlp.activation is ACTIVATIONS["swiglu"]:
            mlp.join = silu_product
        parts = _parts(block)
        if parts is not None:
            block.enter = partial(_enter, parts, block.enter)
            block.leave = partial(_leave, parts, block.leave)
            fused += 1
    norm = None if paged.model.final_norm is None else _rms_norm(paged.model.final_norm)
    head = paged.model.head
    if norm is not None and type(head) is OutputHead and head.product is F.linear:
        paged.logits = partial(_logits, paged.logits, paged.model, norm)
    return fused


@dataclass(frozen=True)
class _Parts:
    """A layer with plain norms and matrices, attention followed by a gated MLP."""

    qkv: tuple[Tensor, Tensor | None]
    out: tuple[Tensor, Tensor | None]
    gate_up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    norms: tuple[tuple[Tensor, float], tuple[Tensor, float]]


def _parts(block: PagedBlock) -> _Parts | None:
    attention, mlp = block.attention, block.mlp
    if attention is None or attention.stacked is None or block.parallel:
        return None
    if not isinstance(mlp, GatedMLP) or mlp.activation is not ACTIVATIONS["swiglu"]:
        return None
    linears = (attention.own.output, mlp.down)
    norms = [_rms_norm(block.norm(name)) for name in ("attention_norm", "mlp_norm")]
    if norms[0] is None or norms[1] is None or any(type(x) is not nn.Linear for x in linears):
        return None
    out, down = ((linear.weight, linear.bias) for linear in linears)
    stacked = ((part.weight, part.bias) for part in (attention.stacked, mlp.stacked))
    qkv, gate_up = stacked
    return _Parts(qkv, out, gate_up, down, (norms[0], norms[1]))


def _rms_norm(norm: nn.Module) -> tuple[Tensor, float] | None:
    if type(norm) is not nn.RMSNorm or norm.eps is None:
        return None
    return norm.weight, norm.eps


def _single(x: Tensor) -> bool:
    return x.shape[0] == 1 and x.is_contiguous()


def _enter(parts: _Parts, usual: Part, x_NE: Tensor) -> Tensor:
    if not _single(x_NE):
        return usual(x_NE)
    weight, bias = parts.qkv
    return gemv(x_NE, weight, bias_F=bias, norm=parts.norms[0])


def _leave(parts: _Parts, usual: Leave, x_NE: Tensor, attended: Tensor | None) -> Tensor:
    if attended is None or not _single(x_NE):
        return usual(x_NE, attended)
    (out, out_bias), (wide, wide_bias), (down, bias) = parts.out, parts.gate_up, parts.down
    x_NE = gemv(attended, out, bias_F=out_bias, residual_1F=x_NE)
    inner = gemv(x_NE, wide, bias_F=wide_bias, norm=parts.norms[1], gated=True)
    return gemv(inner, down, bias_F=bias, residual_1F=x_NE)


def _logits(usual: Part, model: GPT, norm: tuple[Tensor, float], x_NE: Tensor) -> Tensor:
    if not _single(x_NE):
        return usual(x_NE)
    return gemv(x_NE, model.output_weight, norm=norm)[:, : model.head.vocab_size]
