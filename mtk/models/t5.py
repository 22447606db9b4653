"""T5 (Raffel et al. 2020): an encoder and a decoder that looks at what the encoder made.

Layers are numbered through: 0..L-1 are the encoder's, L..2L-1 the decoder's, so that pipeline
stages, recomputation and sharding treat them as one stack. Every stage takes and returns the
states of both; those of the decoder wait while the encoder runs.

With learned positions, biases and LayerNorm it is Megatron-LM's T5, with relative biases,
RMSNorm and unscaled scores the published one.

Shape suffixes: B batch, S encoder tokens, T decoder tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mtk.config.model import ModelConfig
from mtk.models.attention import (
    CAUSAL,
    EVERYWHERE,
    Attention,
    AttentionKernel,
    Form,
    LayerCache,
    sdpa_kernel,
)
from mtk.models.block import Block
from mtk.models.gpt import GPT, Memory
from mtk.models.norm import make_norm
from mtk.models.relative import RelativeBias
from mtk.models.score_bias import distances, with_masks

States = tuple[Tensor, Tensor]


class DecoderCache(LayerCache, Protocol):
    """What a layer of the decoder keeps: its own keys and values, and those of the encoder's
    states. look: see :class:`mtk.models.attention.Look`."""

    def look(self, q_BHSD: Tensor, /) -> Tensor: ...


class DecoderBlock(Block):
    """A block with attention to the encoder's states between its own attention and the MLP."""

    def __init__(self, config: ModelConfig, kernel: AttentionKernel) -> None:
        super().__init__(config, kernel)
        self.cross_norm = make_norm(config)
        self.cross_attention = Attention(config, kernel, EVERYWHERE)

    def forward(  # type: ignore[override]
        self,
        x_BSE: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: DecoderCache | None = None,
        documents: Tensor | None = None,
        bias: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """memory: the encoder's states and where to look in them; None: the cache has what is
        needed of them."""
        attended = self.attention(self.attention_norm(x_BSE), rotary, mask, cache, None, bias)
        x_BSE = x_BSE + self.dropout(attended)
        normed = self.cross_norm(x_BSE)
        if memory is None:
            assert cache is not None
            looked = self.cross_attention.look(normed, cache.look)
        else:
            states_BSE, seen = memory
            looked = self.cross_attention(normed, None, seen, None, None, None, states_BSE)
        x_BSE = x_BSE + self.dropout(looked)
        return x_BSE + self.dropout(self.mlp(self.mlp_norm(x_BSE)))  # type: ignore[no-any-return]


class T5(GPT):
    """:class:`GPT`'s parts around two stacks of layers.

    The token embedding (and, where they are learned, that of positions) serves both stacks.
    """

    def __init__(self, config: ModelConfig, kernel: AttentionKernel = sdpa_kernel) -> None:
        super().__init__(config, kernel)
        relative = config.position_embedding_type == "relative"
        self.encoder_norm: nn.Module | None = make_norm(config)
        self.relative_bias = None
        self.encoder_bias = RelativeBias.of(config, bidirectional=True) if relative else None
        self.decoder_bias = RelativeBias.of(config, bidirectional=False) if relative else None
        self.output_bias: nn.Parameter | None = None
        if config.add_bias_linear:
            self.output_bias = nn.Parameter(torch.zeros(config.padded_vocab_size))
        self.output_scale = config.hidden_size**-0.5 if config.scale_tied_output else None

    def make_layers(self, kernel: AttentionKernel) -> Iterable[nn.Module]:
        count = self.config.num_layers
        yield from (Block(self.config, kernel, form=EVERYWHERE) for _ in range(count))
        yield from (DecoderBlock(self.config, kernel) for _ in range(count))

    def keep(self, layers: range, *, first: bool, last: bool) -> None:
        super().keep(layers, first=first, last=last)
        # The encoder ends where its last layer is.
        if self.config.num_layers - 1 not in layers:
            self.encoder_norm = None
        if not last:
            self.output_bias = None

    def forward(  # type: ignore[override]
        self,
        inputs: Tensor | States,
        decoder_tokens: Tensor | None = None,
        *,
        documents: Tensor | None = None,
    ) -> Tensor | States:
        """Logits [B, T, V] of the token after each decoder token.

        inputs: encoder token ids [B, S]; on a later pipeline stage the states of both stacks
        from the stage before. decoder_tokens: ids [B, T], needed by the first stage.
        documents: int64 [B, S], 0 where the encoder has a real token, else padding. Returns
        the states of both stacks where a later stage follows.
        """
        if isinstance(inputs, Tensor):
            assert decoder_tokens is not None
            memory_BSE, x_BTE = self.embed(inputs), self.embed(decoder_tokens)
            lengths = inputs.shape[1], decoder_tokens.shape[1]
        else:
            memory_BSE, x_BTE = inputs
            lengths = self.config.seq_length, self.config.decoder_seq_length
        memory_BSE = self.encode(memory_BSE, lengths[0], documents)
        x_BTE = self.decode(x_BTE, lengths[1], memory_BSE, documents)
        if not self.last:
            # A stage returns tensors of its own, also those that it only passes on.
            return memory_BSE.view_as(memory_BSE), x_BTE.view_as(x_BTE)
        assert self.final_norm is not None
        return self.logits(self.final_norm(x_BTE))

    def encoded(self, tokens_BS: Tensor) -> Tensor:
        """The encoder's states [B, S, E] of whole texts, without padding; all layers are here."""
        return self.encode(self.embed(tokens_BS), tokens_BS.shape[1], None)

    def kept_of(self, memory_BSE: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, G, S, D] of the encoder's states, for each layer of the decoder."""
        return [block.cross_attention.keys_values(memory_BSE) for block in self._decoder]  # type: ignore[operator, union-attr]

    def continued(
        self,
        tokens_BT: Tensor,
        positions: Tensor,
        *,
        mask: Tensor,
        caches: Sequence[DecoderCache],
    ) -> Tensor:
        """Logits [B, T, V] of the token after each new token of the decoder.

        positions: int64 [T] or [B, T]. mask: bool, broadcastable to [B, heads, T, all tokens],
        True where a new token may look at those of the decoder. caches: one a decoder's layer.
        """
        assert self.embedding is not None and self.final_norm is not None
        x_BTE = self.embedding(tokens_BT, positions)
        places = torch.arange(mask.shape[-1], device=mask.device)
        limits: tuple[Tensor | None, Tensor | None] = mask, None
        if self.decoder_bias is not None:
            bias = self.decoder_bias(distances(positions, places))
            # The mask is in the bias.
            limits = None, with_masks(bias, mask, None, CAUSAL).to(x_BTE.dtype)
        x_BTE = self.run_layers(self._decoder, x_BTE, None, limits[0], caches, None, limits[1])
        return self.logits(self.final_norm(x_BTE))

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """What either stack starts from."""
        assert self.embedding is not None
        positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        return self.embedding(tokens_BS, positions)  # type: ignore[no-any-return]

    def encode(self, x_BSE: Tensor, length: int, documents: Tensor | None) -> Tensor:
        """States after the encoder's layers that are here, and its norm if it ends here."""
        blocks = self._layers(range(self.config.num_layers))
        if blocks:
            bias = self._bias(self.encoder_bias, length, documents, EVERYWHERE, x_BSE)
            documents = None if bias is not None else documents
            x_BSE = self.run_layers(blocks, x_BSE, None, None, None, documents, bias)
        return x_BSE if self.encoder_norm is None else self.encoder_norm(x_BSE)

    def decode(
        self, x_BTE: Tensor, length: int, memory_BSE: Tensor, documents: Tensor | None
    ) -> Tensor:
        """States after the decoder's layers that are here."""
        blocks = self._decoder
        if not blocks:
            return x_BTE
        bias = self._bias(self.decoder_bias, length, None, CAUSAL, x_BTE)
        seen = None if documents is None else (documents == 0)[:, None, None]
        memory = memory_BSE, seen
        return self.run_layers(blocks, x_BTE, None, None, None, None, bias, memory)

    def logits(self, x_BSE: Tensor) -> Tensor:
        """Project states [..., E] to logits [..., V]."""
        scaled = x_BSE if self.output_scale is None else x_BSE * self.output_scale
        logits = super().logits(scaled)
        return logits if self.output_bias is None else logits + self.output_bias[: logits.shape[-1]]

    @property
    def _decoder(self) -> list[nn.Module]:
        count = self.config.num_layers
        return self._layers(range(count, 2 * count))

    def _layers(self, numbers: range) -> list[nn.Module]:
        return [block for index, block in self.layers.items() if int(index) in numbers]

    def _bias(
        self,
        table: RelativeBias | None,
        length: int,
        documents: Tensor | None,
        form: Form,
        like: Tensor,
    ) -> Tensor | None:
        """[1 or B, H, S, S] with all masks in it, in the type of ``like``."""
        if table is None:
            return None
        places = torch.arange(length, device=like.device)
        bias = table(distances(places, places))
        return with_masks(bias, None, documents, form).to(like.dtype)
