"""Self-attention: MHA, GQA (Ainslie et al. 2023) and MQA, with kernel and cache passed in.

Shape suffixes: B batch, S new tokens, T all tokens seen, H query heads, G key/value heads,
D channels of a head, E hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtk.config.model import ModelConfig
from mtk.models.norm import make_norm
from mtk.models.rotary import rotate


@dataclass(frozen=True)
class Form:
    """Which of a sequence's tokens a query looks at.

    causal: itself and those before it; else all. window: of these only the last ``window``,
    itself among them (Beltagy et al. 2020, as in Mistral); needs causal.
    """

    causal: bool = True
    window: int | None = None


CAUSAL = Form()
EVERYWHERE = Form(causal=False)


class AttentionKernel(Protocol):
    """Computes softmax(q k^T / sqrt(D) + bias) v.

    mask: bool, True where a query may look, broadcastable to [B, H, S, T]; None means
    ``form`` with S == T, and with a mask ``form`` does not count. documents: int64 [B, S], a
    number per packed document: a query then looks inside its own document only (not together
    with ``mask``). bias: added to the scores, broadcastable to [B, H, S, T].
    """

    def __call__(
        self,
        q_BHSD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        *,
        mask: Tensor | None,
        dropout: float,
        documents: Tensor | None = None,
        form: Form = CAUSAL,
        bias: Tensor | None = None,
    ) -> Tensor: ...


class LayerCache(Protocol):
    """Keys and values of one layer: takes those of the new tokens, returns all so far."""

    def update(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]: ...


class Look(Protocol):
    """Attention to keys and values that are kept elsewhere: queries [B, H, S, D], scaled as the
    kernels take them -> what they found, of the same shape."""

    def __call__(self, q_BHSD: Tensor, /) -> Tensor: ...


def sdpa_kernel(
    q_BHSD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    *,
    mask: Tensor | None,
    dropout: float,
    documents: Tensor | None = None,
    form: Form = CAUSAL,
    bias: Tensor | None = None,
) -> Tensor:
    """PyTorch's scaled_dot_product_attention, which picks an implementation itself."""
    mask = score_mask(q_BHSD, mask, documents, form, bias)
    if spreads_groups(q_BHSD, k_BGTD, mask):
        repeats = q_BHSD.shape[1] // k_BGTD.shape[1]
        k_BGTD = k_BGTD.repeat_interleave(repeats, dim=1)
        v_BGTD = v_BGTD.repeat_interleave(repeats, dim=1)
    return F.scaled_dot_product_attention(
        q_BHSD,
        k_BGTD,
        v_BGTD,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and form.causal,
        enable_gqa=q_BHSD.shape[1] != k_BGTD.shape[1],
    )


def spreads_groups(q_BHSD: Tensor, k_BGTD: Tensor, mask: Tensor | None) -> bool:
    """On CUDA the fused kernel that takes a mask knows no groups of heads; PyTorch's own way out
    repeats keys and values too, and keeps all scores besides."""
    return q_BHSD.is_cuda and mask is not None and q_BHSD.shape[1] != k_BGTD.shape[1]


def reference_kernel(
    q_BHSD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    *,
    mask: Tensor | None,
    dropout: float,
    documents: Tensor | None = None,
    form: Form = CAUSAL,
    bias: Tensor | None = None,
) -> Tensor:
    """The formula written out; what every faster kernel is checked against."""
    repeats = q_BHSD.shape[1] // k_BGTD.shape[1]
    k_BHTD = k_BGTD.repeat_interleave(repeats, dim=1)
    v_BHTD = v_BGTD.repeat_interleave(repeats, dim=1)
    scores = q_BHSD @ k_BHTD.transpose(-1, -2) / q_BHSD.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias
    if documents is not None:
        mask = document_mask(documents, form)
    elif mask is None:
        mask = form_mask(scores.shape[-1], form, scores.device)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return F.dropout(weights, dropout, training=dropout > 0) @ v_BHTD


def form_mask(length: int, form: Form, device: torch.device) -> Tensor:
    """Bool [S, S]: True where a query may look at a key."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device)
    if form.causal:
        mask = mask.tril()
    return mask if form.window is None else mask.triu(1 - form.window)


def document_mask(documents_BS: Tensor, form: Form = CAUSAL) -> Tensor:
    """Bool [B, 1, S, S]: True where a query may look at a key of its document."""
    allowed = form_mask(documents_BS.shape[1], form, documents_BS.device)
    return (allowed & (documents_BS[:, :, None] == documents_BS[:, None, :]))[:, None]


def score_mask(
    q_BHSD: Tensor, mask: Tensor | None, documents: Tensor | None, form: Form, bias: Tensor | None
) -> Tensor | None:
    """All that limits or shifts scores in one tensor, as SDPA takes it: bool, or with a bias
    what is added to them; None where a kernel needs none (causal, or all tokens)."""
    if documents is not None:
        mask = document_mask(documents, form)
    elif mask is None and (form.window is not None or (bias is not None and form.causal)):
        mask = form_mask(q_BHSD.shape[-2], form, q_BHSD.device)
    if bias is None:
        return mask
    bias = bias.to(q_BHSD.dtype)
    return bias if mask is None else bias.masked_fill(~mask, float("-inf"))


def form_of(config: ModelConfig) -> Form:
    """Where a decoder's tokens look; a bias on the scores holds all masks already."""
    if config.biases_scores:
        return EVERYWHERE
    return Form(window=config.window_size)


class Attention(nn.Module):
    """Projections around an attention kernel; biases and norms as the configuration says.

    form: where tokens look (default: as a decoder's).
    """

    def __init__(
        self, config: ModelConfig, kernel: AttentionKernel, form: Form | None = None
    ) -> None:
        super().__init__()
        hidden, head = config.hidden_size, config.head_size
        self.head_size = head
        self.dropout = config.attention_dropout
        self.kernel = kernel
        self.form = form_of(config) if form is None else form
        self.interleaved = config.rotary_interleaved
        # Kernels divide by sqrt(D); another scale is brought in with the queries.
        scale = config.softmax_scale
        self.query_scale = None if scale is None else scale * head**0.5
        self.query = nn.Linear(hidden, config.num_attention_heads * head, bias=config.qkv_bias)
        self.key = nn.Linear(hidden, config.query_groups * head, bias=config.qkv_bias)
        self.value = nn.Linear(hidden, config.query_groups * head, bias=config.qkv_bias)
        self.query_norm = make_norm(config, head) if config.qk_layernorm else None
        self.key_norm = make_norm(config, head) if config.qk_layernorm else None
        self.output = nn.Linear(
            config.num_attention_heads * head, hidden, bias=config.attention_output_bias
        )

    def forward(
        self,
        x_BSE: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: LayerCache | None,
        documents: Tensor | None = None,
        bias: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """mask, documents, bias: as for :class:`AttentionKernel`. memory: [B, T, E] that keys
        and values come from instead of ``x_BSE``."""
        source = x_BSE if memory is None else memory
        query, key, value = self.project(x_BSE, source)
        q_BHSD, k_BGSD, v_BGSD = self._queries(query), self._keys(key), self._heads(value)
        if rotary is not None:
            q_BHSD = rotate(q_BHSD, *rotary, interleaved=self.interleaved)
            k_BGSD = rotate(k_BGSD, *rotary, interleaved=self.interleaved)
        if cache is not None:
            k_BGSD, v_BGSD = cache.update(k_BGSD, v_BGSD)
        out_BHSD = self.kernel(
            q_BHSD,
            k_BGSD,
            v_BGSD,
            mask=mask,
            dropout=self.dropout if self.training else 0.0,
            documents=documents,
            form=self.form,
            bias=bias,
        )
        return self.output(out_BHSD.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def keys_values(self, source_BTE: Tensor) -> tuple[Tensor, Tensor]:
        """[B, G, T, D] each, for whoever keeps them and gives them to :meth:`look`."""
        return self._keys(self.key(source_BTE)), self._heads(self.value(source_BTE))

    def look(self, x_BSE: Tensor, kept: Look) -> Tensor:
        """Attention to keys and values that somebody keeps, without positions."""
        out_BHSD = kept(self._queries(self.query(x_BSE)))
        return self.output(out_BHSD.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def project(self, x_BSE: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of ``x_BSE``, keys and values of ``source``, all heads side by side."""
        return self.query(x_BSE), self.key(source), self.value(source)

    def _queries(self, query: Tensor) -> Tensor:
        """Heads, scaled and normed as the model is."""
        q_BHSD = self._heads(query)
        if self.query_scale is not None:
            q_BHSD = q_BHSD * self.query_scale
        return q_BHSD if self.query_norm is None else self.query_norm(q_BHSD)

    def _keys(self, key: Tensor) -> Tensor:
        k_BGSD = self._heads(key)
        return k_BGSD if self.key_norm is None else self.key_norm(k_BGSD)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_size).transpose(1, 2)
