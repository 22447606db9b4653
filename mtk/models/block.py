"""A pre-norm transformer block (Xiong et al. 2020)."""

from __future__ import annotations

from torch import Tensor, nn

from mtk.config.model import ModelConfig
from mtk.models.attention import Attention, AttentionKernel, Form, LayerCache
from mtk.models.balance import BalanceLosses
from mtk.models.mlp import MLP
from mtk.models.moe import MoE
from mtk.models.norm import make_norm

__all__ = ["Block", "make_norm"]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); dropout on both branches. With parallel
    residuals (Wang & Komatsuzaki 2021) both branches read the same x.

    balance: the model's record; with it the MLP is a mixture of experts. form: where tokens look
    (default: as a decoder's).
    """

    def __init__(
        self,
        config: ModelConfig,
        kernel: AttentionKernel,
        balance: BalanceLosses | None = None,
        form: Form | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, kernel, form)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config) if balance is None else MoE(config, balance)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.parallel = config.use_parallel_residual

    def forward(
        self,
        x_BSE: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        documents: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        normed = self.attention_norm(x_BSE)
        attended = self.dropout(self.attention(normed, rotary, mask, cache, documents, bias))
        if self.parallel:
            return x_BSE + attended + self.dropout(self.mlp(self.mlp_norm(x_BSE)))  # type: ignore[no-any-return]
        x_BSE = x_BSE + attended
        return x_BSE + self.dropout(self.mlp(self.mlp_norm(x_BSE)))  # type: ignore[no-any-return]
