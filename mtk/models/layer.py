"""A model's layers by number: all alike, or of the kinds that a pattern names.

Shape suffixes: B batch, S tokens, E hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mtk.config.mamba import ATTENTION, EXPERTS, MAMBA
from mtk.config.model import ModelConfig
from mtk.models.attention import Attention, AttentionKernel
from mtk.models.balance import BalanceLosses
from mtk.models.block import Block
from mtk.models.mamba import Mamba
from mtk.models.mlp import MLP
from mtk.models.moe import MoE
from mtk.models.norm import make_norm


class SingleBlock(nn.Module):
    """x + part(norm(x)) with one part only, the others None; dropout on the branch.

    Called as a :class:`mtk.models.block.Block`, with parts and norms of the same names, so that
    whatever cuts, wraps or saves blocks need not tell them apart. ``cache`` is that of the kind:
    a ``StateCache`` for Mamba, a ``LayerCache`` for attention.
    """

    def __init__(
        self, config: ModelConfig, kind: str, kernel: AttentionKernel, balance: BalanceLosses | None
    ) -> None:
        super().__init__()
        self.attention: Attention | None = None
        self.mamba: Mamba | None = None
        self.mlp: MLP | MoE | None = None
        if kind == ATTENTION:
            self.attention_norm = make_norm(config)
            self.attention = Attention(config, kernel)
        elif kind == MAMBA:
            self.mamba_norm = make_norm(config)
            self.mamba = Mamba(config)
        else:
            self.mlp_norm = make_norm(config)
            expert = kind == EXPERTS and balance is not None
            self.mlp = MoE(config, balance) if expert and balance else MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        x_BSE: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: Any = None,
        documents: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        if self.attention is not None:
            normed = self.attention_norm(x_BSE)
            # A bias has them in it.
            documents = documents if bias is None else None
            branch = self.attention(normed, rotary, mask, cache, documents, bias)
        elif self.mamba is not None:
            branch = self.mamba(self.mamba_norm(x_BSE), cache, documents)
        else:
            assert self.mlp is not None
            branch = self.mlp(self.mlp_norm(x_BSE))
        return x_BSE + self.dropout(branch)  # type: ignore[no-any-return]


def make_layer(
    config: ModelConfig, index: int, kernel: AttentionKernel, balance: BalanceLosses | None
) -> nn.Module:
    """Layer number ``index``. balance: the model's record, None without experts."""
    if config.hybrid_layer_pattern is None:
        return Block(config, kernel, balance if config.has_experts(index) else None)
    return SingleBlock(config, config.hybrid_layer_pattern[index], kernel, balance)
