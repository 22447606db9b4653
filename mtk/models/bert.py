"""BERT (Devlin et al. 2019): an encoder with a masked-token head and a segment-order head.

Two placements of its norms: ``pre`` as Megatron-LM's BERT (Shoeybi et al. 2019, section 5.3)
with a norm at the end, ``post`` as first published, with a norm after the embedding.

Shape suffixes: B batch, S sequence, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mtk.config.heads import TASKS
from mtk.config.model import ModelConfig
from mtk.models.attention import EVERYWHERE, AttentionKernel, LayerCache, sdpa_kernel
from mtk.models.block import Block, make_norm
from mtk.models.gpt import GPT, Embedding
from mtk.models.mlp import ACTIVATIONS


class SegmentEmbedding(Embedding):
    """Token, position and segment embeddings, summed; then a norm where norms come last."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.types: nn.Embedding | None = nn.Embedding(config.num_tokentypes, config.hidden_size)
        self.norm = make_norm(config) if config.norm_placement == "post" else None

    def forward(  # type: ignore[override]
        self, tokens_BS: Tensor, positions: Tensor, types_BS: Tensor
    ) -> Tensor:
        assert self.positions is not None and self.types is not None
        x_BSE = self.tokens(tokens_BS) + self.positions(positions) + self.types(types_BS)
        return self.dropout(x_BSE if self.norm is None else self.norm(x_BSE))  # type: ignore[no-any-return]


class PostNormBlock(Block):
    """norm(x + attention(x)), then norm(x + mlp(x)) (Vaswani et al. 2017)."""

    def forward(
        self,
        x_BSE: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        documents: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        attended = self.attention(x_BSE, rotary, mask, cache, documents, bias)
        x_BSE = self.attention_norm(x_BSE + self.dropout(attended))
        return self.mlp_norm(x_BSE + self.dropout(self.mlp(x_BSE)))  # type: ignore[no-any-return]


class Transform(nn.Module):
    """norm(act(dense(x))): what stands before the output matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.head_activation]
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = make_norm(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(x)))  # type: ignore[no-any-return]


def _as_is(x_BSE: Tensor) -> Tensor:
    return x_BSE


class Pooler(nn.Module):
    """tanh(dense(state of the first token)): [B, S, E] -> [B, E].

    whole: makes [B, S, E] of the states here, where ranks hold only some of the rows.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.whole: Callable[[Tensor], Tensor] = _as_is

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.dense(self.whole(x_BSE)[:, 0]).tanh()  # type: ignore[no-any-return]


class Classifier(nn.Module):
    """linear(dropout(pooled)): [B, E] -> [B, outputs] of a task."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.task_head is not None
        self.p = config.hidden_dropout
        self.dropout: nn.Module = nn.Dropout(self.p)
        self.dense = nn.Linear(config.hidden_size, TASKS[config.task_head].outputs)

    def forward(self, x_BE: Tensor) -> Tensor:
        return self.dense(self.dropout(x_BE))  # type: ignore[no-any-return]


class Bert(GPT):
    """:class:`GPT`'s layers looking both ways, with BERT's embedding and heads: those of
    pretraining, whose output matrix is the token embedding with a bias of its own, or that of a
    task (pooler and classifier).
    """

    def __init__(self, config: ModelConfig, kernel: AttentionKernel = sdpa_kernel) -> None:
        super().__init__(config, kernel)
        self.embedding = SegmentEmbedding(config)
        if config.norm_placement == "post":
            self.final_norm = None
        pretraining, binary = config.task_head is None, config.bert_binary_head
        self.transform: Transform | None = Transform(config) if pretraining else None
        bias = nn.Parameter(torch.zeros(config.padded_vocab_size)) if pretraining else None
        self.output_bias: nn.Parameter | None = bias
        pooled = binary or not pretraining
        self.pooler: Pooler | None = Pooler(config) if pooled else None
        self.order: nn.Linear | None = nn.Linear(config.hidden_size, 2) if binary else None
        self.classifier = None if pretraining else Classifier(config)

    def make_layers(self, kernel: AttentionKernel) -> Iterable[nn.Module]:
        kind = PostNormBlock if self.config.norm_placement == "post" else Block
        count = self.config.num_layers
        return (kind(self.config, kernel, form=EVERYWHERE) for _ in range(count))

    def keep(self, layers: range, *, first: bool, last: bool) -> None:
        super().keep(layers, first=first, last=last)
        if not first and isinstance(self.embedding, SegmentEmbedding):
            self.embedding.types = None
        if not last:
            self.transform = self.output_bias = self.pooler = self.order = None
            self.classifier = None

    def forward(  # type: ignore[override]
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        *,
        types: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, S, V] of the token at each place, and [B, 2] of whether segments are in
        order (0) or swapped (1) if there is a binary head; with the head of a task its
        [B, outputs] alone.

        inputs: token ids [B, S], or states on a later pipeline stage. types: int64 [B, S],
        default 0. documents: int64 [B, S]; tokens look at those of their own number only, so
        that padding gets another one. Returns states where a later stage follows.
        """
        x_BSE = self.states(inputs, positions, types=types, documents=documents)
        if not self.last:
            return x_BSE
        if self.classifier is not None and self.pooler is not None:
            return self.classifier(self.pooler(x_BSE))  # type: ignore[no-any-return]
        logits = self.logits(x_BSE)
        if self.pooler is None or self.order is None:
            return logits
        return logits, self.order(self.pooler(x_BSE))

    def states(
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        *,
        types: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """States [B, S, E] after the last layer; arguments as for :meth:`forward`."""
        x_BSE = inputs
        if self.first and self.embedding is not None:
            if positions is None:
                positions = torch.arange(inputs.shape[1], device=inputs.device)
            types = torch.zeros_like(inputs) if types is None else types
            x_BSE = self.embedding(inputs, positions, types)
        blocks = list(self.layers.values())
        x_BSE = self.run_layers(blocks, x_BSE, None, None, None, documents)
        return x_BSE if self.final_norm is None else self.final_norm(x_BSE)

    def logits(self, x_BSE: Tensor) -> Tensor:
        """Project states [..., E] to logits [..., V]."""
        assert self.transform is not None and self.output_bias is not None
        logits = super().logits(self.transform(x_BSE))
        return logits + self.output_bias[: logits.shape[-1]]
