"""All weights of a GPT or BERT as Megatron names them: shape of the whole, and how ranks cut it.

Shape suffixes of the text: V vocabulary rows, E hidden size, P positions, F width of the MLP,
H query heads, G key/value heads, D channels of a head, X experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mtk.config.model import ModelConfig


@dataclass(frozen=True)
class Cut:
    """Tensor-parallel ranks hold pieces along ``dim``; of a gated MLP's first matrix each
    rank holds a piece of both ``parts``, its gate and its up, one after the other."""

    dim: int
    parts: int = 1

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole of the ranks' pieces, in their order."""
        if len(pieces) == 1:
            return pieces[0]
        parts = [piece.chunk(self.parts, self.dim) for piece in pieces]
        ordered = [part[index] for index in range(self.parts) for part in parts]
        return torch.cat(ordered, self.dim)

    def piece(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """What ``rank`` of ``size`` holds, in memory of its own."""
        parts = whole.chunk(self.parts, self.dim)
        own = [part.chunk(size, self.dim)[rank] for part in parts]
        return torch.cat(own, self.dim) if self.parts > 1 else own[0].clone()

    def shape(self, whole: tuple[int, ...], size: int) -> tuple[int, ...]:
        """Of a piece."""
        return tuple(n // size if d == self.dim else n for d, n in enumerate(whole))


ROWS, COLUMNS, GATE_UP = Cut(0), Cut(1), Cut(0, parts=2)
EXPERT_ROWS, EXPERT_COLUMNS, EXPERT_GATE_UP = Cut(1), Cut(2), Cut(1, parts=2)


@dataclass(frozen=True)
class Weight:
    """One weight. part: its name, in a layer without ``decoder.layers.N.``. cut: None for
    what every rank holds whole. place: the layer, or which end of the pipeline."""

    part: str
    shape: tuple[int, ...]
    cut: Cut | None
    place: int | Literal["first", "last"]

    @property
    def name(self) -> str:
        """With the global number of the layer."""
        layer = f"decoder.layers.{self.place}." if isinstance(self.place, int) else ""
        return layer + self.part

    @property
    def of_experts(self) -> bool:
        """Whether it is a stack [X, ...] of which files hold one matrix an expert."""
        return self.part.startswith("mlp.experts.")

    def local_shape(self, tensor_size: int) -> tuple[int, ...]:
        """On a tensor-parallel rank; of experts, all of them."""
        return self.shape if self.cut is None else self.cut.shape(self.shape, tensor_size)

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole of what the ranks hold."""
        return pieces[0] if self.cut is None else self.cut.join(pieces)

    def piece(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """What a rank holds."""
        return whole.clone() if self.cut is None else self.cut.piece(whole, rank, size)


def weights_of(config: ModelConfig, rows: int) -> list[Weight]:
    """Every weight once. rows: of the padded vocabulary, V."""
    width, positions = config.hidden_size, config.positions
    found = [Weight("embedding.word_embeddings.weight", (rows, width), ROWS, "first")]
    if config.position_embedding_type == "learned":
        name = "embedding.position_embeddings.weight"
        found.append(Weight(name, (positions, width), None, "first"))
    if config.family == "bert":
        name = "embedding.tokentype_embeddings.weight"
        found.append(Weight(name, (config.num_tokentypes, width), None, "first"))
    for layer in range(config.num_layers):
        found += _layer(config, layer)
    found += _norm(config, "decoder.final_layernorm", "last")
    if config.untie_embeddings_and_output_weights:
        found.append(Weight("output_layer.weight", (rows, width), ROWS, "last"))
    if config.family == "bert":
        found += _bert_heads(config, rows)
    return found


def _bert_heads(config: ModelConfig, rows: int) -> Iterator[Weight]:
    width = config.hidden_size
    linears = {"lm_head.dense": width}
    if config.bert_binary_head:
        linears |= {"pooler.dense": width, "binary_head": 2}
    for name, outputs in linears.items():
        yield Weight(f"{name}.weight", (outputs, width), None, "last")
        yield Weight(f"{name}.bias", (outputs,), None, "last")
    yield from _norm(config, "lm_head.layernorm", "last")
    yield Weight("lm_head.bias", (rows,), ROWS, "last")


def _layer(config: ModelConfig, layer: int) -> Iterator[Weight]:
    width, head = config.hidden_size, config.head_size
    queries = config.num_attention_heads * head
    mixed = queries + 2 * config.query_groups * head
    yield from _norm(config, "input_layernorm", layer)
    yield Weight("self_attention.linear_qkv.weight", (mixed, width), ROWS, layer)
    if config.qkv_bias:
        yield Weight("self_attention.linear_qkv.bias", (mixed,), ROWS, layer)
    yield Weight("self_attention.linear_proj.weight", (width, queries), COLUMNS, layer)
    if config.attention_output_bias:
        yield Weight("self_attention.linear_proj.bias", (width,), None, layer)
    if config.qk_layernorm:
        for part in ("q", "k"):
            yield from _norm(config, f"self_attention.{part}_layernorm", layer, head)
    yield from _norm(config, "pre_mlp_layernorm", layer)
    yield from _experts(config, layer) if config.has_experts(layer) else _mlp(config, layer)


def _mlp(config: ModelConfig, layer: int) -> Iterator[Weight]:
    gated = config.activation == "swiglu"
    width, ffn = config.hidden_size, config.ffn_size
    first = 2 * ffn if gated else ffn
    cut = GATE_UP if gated else ROWS
    yield Weight("mlp.linear_fc1.weight", (first, width), cut, layer)
    if config.add_bias_linear:
        yield Weight("mlp.linear_fc1.bias", (first,), cut, layer)
    yield Weight("mlp.linear_fc2.weight", (width, ffn), COLUMNS, layer)
    if config.add_bias_linear:
        yield Weight("mlp.linear_fc2.bias", (width,), None, layer)


def _experts(config: ModelConfig, layer: int) -> Iterator[Weight]:
    gated = config.activation == "swiglu"
    count, width, ffn = config.num_experts or 0, config.hidden_size, config.moe_ffn_size
    first = (count, 2 * ffn if gated else ffn, width)
    cut = EXPERT_GATE_UP if gated else EXPERT_ROWS
    yield Weight("mlp.router.weight", (count, width), None, layer)
    yield Weight("mlp.experts.linear_fc1.weight", first, cut, layer)
    yield Weight("mlp.experts.linear_fc2.weight", (count, width, ffn), EXPERT_COLUMNS, layer)
    if config.moe_router_enable_expert_bias:
        yield Weight("mlp.router.expert_bias", (count,), None, layer)
    shared = config.moe_shared_expert_intermediate_size
    if shared is not None:
        both = (2 * shared if gated else shared, width)
        one = GATE_UP if gated else ROWS
        yield Weight("mlp.shared_experts.linear_fc1.weight", both, one, layer)
        yield Weight("mlp.shared_experts.linear_fc2.weight", (width, shared), COLUMNS, layer)
    if config.moe_shared_expert_gate:
        yield Weight("mlp.shared_experts.gate_weight", (1, width), None, layer)


def _norm(
    config: ModelConfig, name: str, place: int | Literal["first", "last"], size: int | None = None
) -> Iterator[Weight]:
    shape = (config.hidden_size if size is None else size,)
    yield Weight(f"{name}.weight", shape, None, place)
    if config.normalization == "LayerNorm":
        yield Weight(f"{name}.bias", shape, None, place)
