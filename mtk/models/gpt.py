"""Decoder-only language model: GPT-2/3 and Llama are settings of this one module.

Shape suffixes: B batch, S new tokens, T all tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtk.config.model import ModelConfig
from mtk.models.attention import AttentionKernel, LayerCache, sdpa_kernel
from mtk.models.block import Block, make_norm
from mtk.models.rotary import rotary_table


class LayerRunner(Protocol):
    """Runs ``blocks`` one after the other; arguments as for :class:`Block`, caches by layer."""

    def __call__(
        self,
        blocks: Sequence[nn.Module],
        x_BSE: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        caches: Sequence[LayerCache] | None,
        documents: Tensor | None,
    ) -> Tensor: ...


def run_in_order(
    blocks: Sequence[nn.Module],
    x_BSE: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    caches: Sequence[LayerCache] | None,
    documents: Tensor | None,
) -> Tensor:
    """The :class:`LayerRunner` that keeps every activation."""
    for index, block in enumerate(blocks):
        cache = None if caches is None else caches[index]
        x_BSE = block(x_BSE, rotary, mask, cache, documents)
    return x_BSE


class Embedding(nn.Module):
    """Token embedding, plus learned absolute positions when the model has them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        learned = config.position_embedding_type == "learned"
        self.positions = nn.Embedding(config.positions, config.hidden_size) if learned else None
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, tokens_BS: Tensor, positions: Tensor) -> Tensor:
        x_BSE = self.tokens(tokens_BS)
        if self.positions is not None:
            x_BSE = x_BSE + self.positions(positions)
        return self.dropout(x_BSE)  # type: ignore[no-any-return]


class OutputHead(nn.Module):
    """States times the output matrix, without the columns of the padded vocabulary."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, x: Tensor, weight_VE: Tensor) -> Tensor:
        logits = F.linear(x, weight_VE)
        return logits if weight_VE.shape[0] == self.vocab_size else logits[..., : self.vocab_size]


class GPT(nn.Module):
    """Embedding, blocks, final norm, output matrix.

    Layers live in a dict by number, so that a pipeline stage can hold some of them and
    names in checkpoints never depend on the layout. Rows of the padded vocabulary never
    take part: the logits have exactly ``vocab_size`` columns.
    """

    def __init__(self, config: ModelConfig, kernel: AttentionKernel = sdpa_kernel) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("the model needs a vocabulary size")
        self.config = config
        self.embedding = Embedding(config)
        self.layers = nn.ModuleDict(
            {str(i): Block(config, kernel) for i in range(config.num_layers)}
        )
        self.run_layers: LayerRunner = run_in_order
        self.final_norm = make_norm(config)
        self.head = OutputHead(config.vocab_size)
        untied = config.untie_embeddings_and_output_weights
        self.output = (
            nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False) if untied else None
        )
        if config.position_embedding_type == "rope":
            cos, sin = rotary_table(
                config.positions,
                config.head_size,
                base=config.rotary_base,
                percent=config.rotary_percent,
            )
            self.register_buffer("rotary_cos", cos, persistent=False)
            self.register_buffer("rotary_sin", sin, persistent=False)

    def forward(
        self,
        tokens_BS: Tensor,
        positions: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, S, V] of the token after each input token.

        positions: int64 [S] or [B, S], default 0..S-1. mask: bool, True where a query may
        look, broadcastable to [B, heads, S, T]; None is causal (only right without
        caches, or for the first tokens into empty ones). caches: one per layer. documents:
        int64 [B, S], tokens look back inside their own document only.
        """
        return self.logits(
            self.hidden(tokens_BS, positions, mask=mask, caches=caches, documents=documents)
        )

    def hidden(
        self,
        tokens_BS: Tensor,
        positions: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """States [B, S, E] after the final norm; arguments as for :meth:`forward`."""
        if positions is None:
            positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        rotary = self._rotary(positions)
        x_BSE = self.embedding(tokens_BS, positions)
        blocks = list(self.layers.values())
        x_BSE = self.run_layers(blocks, x_BSE, rotary, mask, caches, documents)
        return self.final_norm(x_BSE)  # type: ignore[no-any-return]

    def logits(self, x_BSE: Tensor) -> Tensor:
        """Project states [..., E] to logits [..., V]."""
        return self.head(x_BSE, self.output_weight)  # type: ignore[no-any-return]

    @property
    def output_weight(self) -> Tensor:
        """[padded vocabulary, E]; the token embedding when tied (Press & Wolf 2017)."""
        return self.embedding.tokens.weight if self.output is None else self.output.weight

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.config.position_embedding_type != "rope":
            return None
        cos, sin = self.rotary_cos[positions], self.rotary_sin[positions]  # type: ignore[index]
        # [B, S, R] gets a head dimension; [S, R] broadcasts as it is.
        return (cos[:, None], sin[:, None]) if positions.ndim == 2 else (cos, sin)
