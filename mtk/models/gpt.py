"""Decoder-only language model: GPT-2/3, GPT-NeoX, BLOOM, Llama, Mistral, Qwen and Gemma are
settings of this one module.

Shape suffixes: B batch, S new tokens, T all tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtk.config.model import ModelConfig
from mtk.models.attention import AttentionKernel, Form, LayerCache, sdpa_kernel
from mtk.models.balance import BalanceLosses
from mtk.models.layer import make_layer
from mtk.models.linear_loss import linear_losses
from mtk.models.mamba import StateCache
from mtk.models.norm import make_norm
from mtk.models.relative import RelativeBias
from mtk.models.rotary import rotary_table
from mtk.models.score_bias import alibi_bias, alibi_slopes, distances, with_masks

# Of attention and of Mamba layers.
AnyCache = LayerCache | StateCache
# x [..., in], weight [out, in] and perhaps a bias [out] -> [..., out]; as ``F.linear``.
Product = Callable[..., Tensor]


# What a decoder's layers look at besides themselves: states [B, S, E], and where (bool,
# broadcastable to [B, heads, T, S]; None: everywhere).
Memory = tuple[Tensor, Tensor | None]


class LayerRunner(Protocol):
    """Runs ``blocks`` one after the other; arguments as for a block, caches by layer."""

    def __call__(
        self,
        blocks: Sequence[nn.Module],
        x_BSE: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        caches: Sequence[AnyCache] | None,
        documents: Tensor | None,
        bias: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Tensor: ...


def run_in_order(
    blocks: Sequence[nn.Module],
    x_BSE: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    caches: Sequence[AnyCache] | None,
    documents: Tensor | None,
    bias: Tensor | None = None,
    memory: Memory | None = None,
) -> Tensor:
    """The :class:`LayerRunner` that keeps every activation."""
    more = () if memory is None else (memory,)
    for index, block in enumerate(blocks):
        cache = None if caches is None else caches[index]
        x_BSE = block(x_BSE, rotary, mask, cache, documents, bias, *more)
    return x_BSE


class Embedding(nn.Module):
    """Token embedding, plus learned absolute positions, scaled and normed where the model is
    so."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        learned = config.position_embedding_type == "learned"
        self.positions = nn.Embedding(config.positions, config.hidden_size) if learned else None
        self.scale = config.hidden_size**0.5 if config.scale_embeddings else None
        self.norm: nn.Module | None = make_norm(config) if config.embedding_layernorm else None
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, tokens_BS: Tensor, positions: Tensor) -> Tensor:
        x_BSE = self.tokens(tokens_BS)
        if self.scale is not None:
            # Gemma was trained with the factor rounded to the type of the embedding.
            x_BSE = x_BSE * torch.tensor(self.scale, dtype=x_BSE.dtype)
        if self.positions is not None:
            x_BSE = x_BSE + self.positions(positions)
        if self.norm is not None:
            x_BSE = self.norm(x_BSE)
        return self.dropout(x_BSE)  # type: ignore[no-any-return]


class OutputHead(nn.Module):
    """States times the output matrix, without the columns of the padded vocabulary.

    chunk: tokens whose logits :meth:`losses` holds at a time (default: all)."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.product: Product = F.linear
        self.chunk: int | None = None

    def forward(self, x: Tensor, weight_VE: Tensor) -> Tensor:
        logits = self.product(x, weight_VE)
        return logits if weight_VE.shape[0] == self.vocab_size else logits[..., : self.vocab_size]

    def losses(self, x_BSE: Tensor, weight_VE: Tensor, labels_BS: Tensor) -> Tensor:
        """Cross-entropy in nats of the labels, fp32 [B, S]; needs the whole matrix."""
        return linear_losses(x_BSE, weight_VE, labels_BS, self.vocab_size, self.chunk)


class GPT(nn.Module):
    """Embedding, blocks, final norm, output matrix.

    Layers live in a dict by number, so that a pipeline stage can hold some of them and
    names in checkpoints never depend on the layout. Rows of the padded vocabulary never
    take part: the logits have exactly ``vocab_size`` columns.

    A pipeline stage is this module after :meth:`keep`: ``first`` and ``last`` say whether it
    takes tokens and whether it returns logits; elsewhere states go in and out.
    """

    def __init__(self, config: ModelConfig, kernel: AttentionKernel = sdpa_kernel) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("the model needs a vocabulary size")
        self.config = config
        self.first = self.last = True
        self.embedding: Embedding | None = Embedding(config)
        self.balance = None if config.num_experts is None else BalanceLosses(config)
        self.layers = nn.ModuleDict(
            {str(i): layer for i, layer in enumerate(self.make_layers(kernel))}
        )
        self.run_layers: LayerRunner = run_in_order
        self.relative_bias: RelativeBias | None = None
        if config.position_embedding_type == "relative":
            self.relative_bias = RelativeBias.of(config, bidirectional=False)
        self.own_heads = slice(None)
        self.final_norm: nn.Module | None = make_norm(config)
        self.head = OutputHead(config.vocab_size)
        untied = config.untie_embeddings_and_output_weights
        self.output = (
            nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False) if untied else None
        )
        self.fill_tables()

    def make_layers(self, kernel: AttentionKernel) -> Iterable[nn.Module]:
        """The layers in order; other families have others."""
        count = self.config.num_layers
        return (make_layer(self.config, i, kernel, self.balance) for i in range(count))

    def fill_tables(self, device: torch.device | None = None) -> None:
        """Put rotary tables or ALiBi's slopes on ``device`` (default: where modules are made).
        They are no weights: a model on the meta device has none until this is called."""
        place = torch.get_default_device() if device is None else device
        # Computed on the CPU, so that they are the same wherever the model is.
        with torch.device("cpu"):
            tables = self._tables()
        for name, table in tables.items():
            self.register_buffer(name, table.to(place), persistent=False)

    def _tables(self) -> dict[str, Tensor]:
        kind = self.config.position_embedding_type
        if kind == "rope":
            return dict(zip(("rotary_cos", "rotary_sin"), rotary_table(self.config), strict=True))
        if kind == "alibi":
            slopes_H = alibi_slopes(self.config.num_attention_heads)
            return {"alibi_slopes": slopes_H[self.own_heads].clone()}
        return {}

    def keep(self, layers: range, *, first: bool, last: bool) -> None:
        """Become the pipeline stage that has these ``layers``; all else is dropped.

        The last stage of a model with tied embeddings keeps the token matrix to multiply
        with, under its own name; it is a copy of the first stage's.
        """
        self.first, self.last = first, last
        self.layers = nn.ModuleDict({str(i): self.layers[str(i)] for i in layers})
        if not first and self.embedding is not None:
            if last and self.output is None and self.config.task_head is None:
                self.embedding.positions = self.embedding.norm = None
            else:
                self.embedding = None
        if not last:
            self.final_norm = self.output = None

    @property
    def stateful_layers(self) -> tuple[int, ...]:
        """Places, among this module's layers, of those whose cache is a state (Mamba)."""
        blocks = enumerate(self.layers.values())
        return tuple(place for place, block in blocks if getattr(block, "mamba", None) is not None)

    def forward(
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        caches: Sequence[AnyCache] | None = None,
        documents: Tensor | None = None,
        key_positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, S, V] of the token after each input token; with ``labels`` (int64 [B, S])
        their losses instead, fp32 [B, S] in nats.

        inputs: token ids [B, S]; on a later pipeline stage the states of the stage before.
        positions: int64 [S] or [B, S], default 0..S-1 (later stages must be told). mask:
        bool, True where a query may look, broadcastable to [B, heads, S, T]; None is causal
        (only right without caches, or for the first tokens into empty ones). caches: one per
        layer (of Mamba layers a ``StateCache``; these know no mask). documents: int64 [B, S],
        tokens look back inside their own document only. key_positions: int64 [T] or [B, T] with
        a mask, of all tokens in the caches, default 0..T-1; windows and biases go by them
        (prompts padded on the left start later).

        Returns states instead where a later pipeline stage follows.
        """
        x = self.hidden(
            inputs,
            positions,
            mask=mask,
            caches=caches,
            documents=documents,
            key_positions=key_positions,
        )
        if not self.last:
            return x
        if labels is not None:
            return self.head.losses(x, self.output_weight, labels)
        return self.logits(x)

    def hidden(
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        caches: Sequence[AnyCache] | None = None,
        documents: Tensor | None = None,
        key_positions: Tensor | None = None,
    ) -> Tensor:
        """States [B, S, E] after the final norm (of a stage: after its last layer); arguments
        as for :meth:`forward`. Raises ValueError on a later stage without ``positions``."""
        if positions is None:
            if not self.first:
                raise ValueError("a later pipeline stage must be given the positions")
            positions = torch.arange(inputs.shape[1], device=inputs.device)
        rotary = self._rotary(positions)
        x_BSE = inputs
        if self.first and self.embedding is not None:
            x_BSE = self.embedding(inputs, positions)
        bias = None
        if self.config.biases_scores:
            bias = self._score_bias(positions, mask, documents, key_positions).to(x_BSE.dtype)
            # Attention finds both in the bias; states of Mamba layers end with their document.
            mask, documents = None, documents if self.config.has_mamba else None
        elif mask is not None and self.config.window_size is not None:
            gaps = self._distances(positions, mask, key_positions)
            mask = mask & (gaps < self.config.window_size)
        blocks = list(self.layers.values())
        x_BSE = self.run_layers(blocks, x_BSE, rotary, mask, caches, documents, bias)
        return x_BSE if self.final_norm is None else self.final_norm(x_BSE)

    def logits(self, x_BSE: Tensor) -> Tensor:
        """Project states [..., E] to logits [..., V]."""
        return self.head(x_BSE, self.output_weight)  # type: ignore[no-any-return]

    @property
    def output_weight(self) -> Tensor:
        """[padded vocabulary, E]; the token embedding when tied (Press & Wolf 2017). Raises
        ValueError on a pipeline stage that has neither."""
        if self.output is not None:
            return self.output.weight
        if self.embedding is None:
            raise ValueError("only the last pipeline stage has an output matrix")
        return self.embedding.tokens.weight

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.config.position_embedding_type != "rope":
            return None
        cos, sin = self.rotary_cos[positions], self.rotary_sin[positions]  # type: ignore[index]
        # [B, S, R] gets a head dimension; [S, R] broadcasts as it is.
        return (cos[:, None], sin[:, None]) if positions.ndim == 2 else (cos, sin)

    def _distances(
        self, positions: Tensor, mask: Tensor | None, key_positions: Tensor | None
    ) -> Tensor:
        """Of each query from each key, int64 [1 or B, 1, S, T]."""
        if mask is None:
            # Of whole sequences in tokens, whatever numbers packed documents begin with.
            counted = torch.arange(positions.shape[-1], device=positions.device)
            return distances(counted, counted)
        if key_positions is None:
            key_positions = torch.arange(mask.shape[-1], device=mask.device)
        return distances(positions, key_positions)

    def _score_bias(
        self,
        positions: Tensor,
        mask: Tensor | None,
        documents: Tensor | None,
        key_positions: Tensor | None,
    ) -> Tensor:
        """fp32 [1 or B, H, S, T], all masks in it."""
        gaps = self._distances(positions, mask, key_positions)
        if self.relative_bias is not None:
            bias = self.relative_bias(gaps)
        else:
            bias = alibi_bias(self.alibi_slopes, gaps)  # type: ignore[arg-type]
        if mask is not None and self.config.window_size is not None:
            mask = mask & (gaps < self.config.window_size)
        return with_masks(bias, mask, documents, Form(window=self.config.window_size))
