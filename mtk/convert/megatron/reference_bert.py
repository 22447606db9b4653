"""A BERT computed straight from the files of Megatron's ranks, as :mod:`reference_forward`
computes a GPT.

Shape suffixes: B batch, S sequence, T keys, E hidden size, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtk.convert.megatron.reference_forward import ReferenceForward, get, linear
from mtk.convert.probe import SegmentInputs, with_order


class BertReferenceForward(ReferenceForward):
    """Logits as ``SegmentProbe`` has them, and states of real tokens."""

    def __call__(self, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
        self._inputs = SegmentInputs.of(tokens_BS)
        logits_BSV, states = super().__call__(tokens_BS)
        return logits_BSV, [x_BSE[:, : self._inputs.real] for x_BSE in states]

    def _embedding(self, tokens_BS: Tensor) -> Tensor:
        names = ("embedding", "language_model.embedding")
        first = self.files.stages[0][0][0]
        types = get(first, *(f"{name}.tokentype_embeddings.weight" for name in names))
        return super()._embedding(tokens_BS) + types[self._inputs.types_BS]

    def _softmax(self, scores_BST: Tensor) -> Tensor:
        """Every token looks at all but padding."""
        hidden_B1T = self._inputs.padding_BS[:, None, :] == 1
        return torch.softmax(scores_BST.masked_fill(hidden_B1T, -math.inf), dim=-1)

    def _logits(self, x_BSE: Tensor) -> Tensor:
        last = self.files.stages[-1][0][0]
        x_BSE = self._final_norm(x_BSE)
        y_BSE = linear(x_BSE, last, "lm_head.dense")
        if self.args.get("openai_gelu"):
            root = math.sqrt(2 / math.pi)
            y_BSE = y_BSE / 2 * (1 + torch.tanh(root * (y_BSE + 0.044715 * y_BSE**3)))
        else:
            y_BSE = y_BSE / 2 * (1 + torch.erf(y_BSE / math.sqrt(2)))
        logits_BSV = self._product(self._norm(y_BSE, last, "lm_head.layernorm."))
        pooled_BE = torch.tanh(
            linear(x_BSE[:, 0], last, "pooler.dense", "language_model.pooler.dense")
        )
        return with_order(logits_BSV, linear(pooled_BE, last, "binary_head"), self._inputs.real)
