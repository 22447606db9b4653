"""Steps of decoding in which products are computed together with what lies around them. Needs
Triton.

A step of one row runs on :mod:`mtk.kernels.gemv`, one of a few on :mod:`mtk.kernels.few_rows`, as
far as layers are of the kind that these know: RMSNorm, plain (one row: also quantised) matrices, a
gated SiLU. All others run as they are, in between.

Shape suffixes: B rows, E hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtk.kernels.few_rows import (
    MOST_ROWS,
    Normed,
    Workspace,
    before_norm,
    product,
    product_before_norm,
)
from mtk.kernels.gemv import gemv
from mtk.models.gpt import OutputHead
from mtk.models.mlp import ACTIVATIONS
from serving.paged.attention import Attend
from serving.paged.layers import GatedMLP, PagedBlock, PagedModel, Stacked, Tokens
from serving.paged.quantized import QuantizedStack
from serving.paged.row_product import RowProduct, row_product

Norm = tuple[Tensor, float]


@dataclass(frozen=True)
class Matrix:
    """A layer's product. one: of one row. weight: of a few, None where those are left to the layer
    itself; and bias."""

    one: RowProduct
    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class Half:
    """What lies around attention or activation: norm, the product before, the product behind."""

    norm: Norm
    inner: Matrix
    outer: Matrix

    @property
    def plain(self) -> bool:
        return self.inner.weight is not None and self.outer.weight is not None


class Steps:
    """Of a model. workspace: of its kernels."""

    def __init__(self, paged: PagedModel, workspace: Workspace) -> None:
        self._paged, self._workspace = paged, workspace
        self._attention = [_attention_half(block) for block in paged.blocks]
        self._mlp = [_mlp_half(block) for block in paged.blocks]
        model = paged.model
        self._final = None if model.final_norm is None else rms_norm(model.final_norm)
        if type(model.head) is not OutputHead or model.head.product is not F.linear:
            self._final = None
        # Rows before their norm could be too large for fp16, and fp32 has no tensor cores on CUDA.
        shape = paged.storage.shape
        exact = shape.dtype == torch.float32 and shape.device.type != "cuda"
        self._few = shape.dtype == torch.bfloat16 or exact

    def logits(self, tokens: Tokens, attend: Attend) -> Tensor:
        """[B, V] of the tokens after these."""
        model = self._paged.model
        assert model.embedding is not None
        x_BE: Tensor = model.embedding(tokens.ids_N, tokens.positions_N).contiguous()
        if x_BE.shape[0] == 1:
            return self._one(x_BE, tokens, attend)
        if self._few and x_BE.shape[0] <= MOST_ROWS:
            return self._some(x_BE, tokens, attend)
        return self._paged.logits(self._paged.through(x_BE, tokens, attend))

    def _one(self, x_1E: Tensor, tokens: Tokens, attend: Attend) -> Tensor:
        for i, block in enumerate(self._paged.blocks):
            half, mlp = self._attention[i], self._mlp[i]
            if half is None:
                x_1E = self._paged.layer(block, x_1E, tokens, attend)
                continue
            qkv = half.inner.one(x_1E, norm=half.norm)
            x_1E = half.outer.one(self._between(block, qkv, tokens, attend), residual_1F=x_1E)
            if mlp is None:
                x_1E = block.feed(x_1E)
                continue
            inner = mlp.inner.one(x_1E, norm=mlp.norm, gated=True)
            x_1E = mlp.outer.one(inner, residual_1F=x_1E)
        if self._final is None:
            return self._paged.logits(x_1E)
        model = self._paged.model
        return gemv(x_1E, model.output_weight, norm=self._final)[:, : model.head.vocab_size]

    def _some(self, x_BE: Tensor, tokens: Tokens, attend: Attend) -> Tensor:
        space, normed = self._workspace, None
        for i, block in enumerate(self._paged.blocks):
            half, mlp = self._attention[i], self._mlp[i]
            if half is None or not half.plain:
                x_BE, normed = self._paged.layer(block, x_BE, tokens, attend), None
                continue
            before = before_norm(x_BE, half.norm) if normed is None else normed
            qkv = _product(before, half.inner, space)
            attended = self._between(block, qkv, tokens, attend)
            if mlp is None or not mlp.plain:
                x_BE, normed = _product(attended, half.outer, space, residual_MF=x_BE), None
                x_BE = block.feed(x_BE)
                continue
            x_BE, normed = _through(attended, half.outer, space, x_BE, mlp.norm)
            assert normed is not None
            inner = _product(normed, mlp.inner, space, gated=True)
            x_BE, normed = _through(inner, mlp.outer, space, x_BE, self._next_norm(i))
        if self._final is None:
            return self._paged.logits(x_BE)
        normed = before_norm(x_BE, self._final) if normed is None else normed
        model = self._paged.model
        return product(normed, model.output_weight, space)[:, : model.head.vocab_size]

    def _between(self, block: PagedBlock, qkv: Tensor, tokens: Tokens, attend: Attend) -> Tensor:
        assert block.attention is not None
        return block.attention.between(qkv, tokens, self._paged.storage, attend)

    def _next_norm(self, i: int) -> Norm | None:
        """What the result of layer ``i`` goes through next, if kernels take it up."""
        if i + 1 == len(self._attention):
            return self._final
        half = self._attention[i + 1]
        return half.norm if half is not None and half.plain else None


def _product(
    x: Tensor | Normed,
    matrix: Matrix,
    space: Workspace,
    *,
    residual_MF: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    assert matrix.weight is not None
    return product(
        x, matrix.weight, space, bias_F=matrix.bias, residual_MF=residual_MF, gated=gated
    )


def _through(
    x: Tensor, matrix: Matrix, space: Workspace, residual_MF: Tensor, norm: Norm | None
) -> tuple[Tensor, Normed | None]:
    """The sum of residual and product, and what the next product needs of it."""
    if norm is None:
        return _product(x, matrix, space, residual_MF=residual_MF), None
    assert matrix.weight is not None
    return product_before_norm(
        x, matrix.weight, space, norm, bias_F=matrix.bias, residual_MF=residual_MF
    )


def _matrix(layer: nn.Module | Stacked | QuantizedStack) -> Matrix | None:
    one = row_product(layer)
    if one is None:
        return None
    if isinstance(layer, Stacked) or type(layer) is nn.Linear:
        return Matrix(one, layer.weight, layer.bias)
    return Matrix(one, None, None)


def _half(
    norm: Norm | None, inner: nn.Module | Stacked | QuantizedStack, outer: nn.Module
) -> Half | None:
    before, behind = _matrix(inner), _matrix(outer)
    if norm is None or before is None or behind is None:
        return None
    return Half(norm, before, behind)


def _attention_half(block: PagedBlock) -> Half | None:
    attention = block.attention
    if attention is None or attention.stacked is None or block.parallel:
        return None
    return _half(rms_norm(block.norm("attention_norm")), attention.stacked, attention.own.output)


def _mlp_half(block: PagedBlock) -> Half | None:
    mlp = block.mlp
    if not isinstance(mlp, GatedMLP) or mlp.activation is not ACTIVATIONS["swiglu"]:
        return None
    return _half(rms_norm(block.norm("mlp_norm")), mlp.stacked, mlp.down)


def rms_norm(norm: nn.Module) -> Norm | None:
    """Weights and epsilon of a plain RMSNorm; None for another norm."""
    if type(norm) is not nn.RMSNorm or norm.eps is None:
        return None
    return norm.weight, norm.eps
