"""A model's layers over tokens of many sequences side by side, without padding.

The modules and weights are the model's own. Matrices that read the same input become rows of
one, so that a step of decoding has fewer and larger products; the model's own then are views of
it, and nothing is kept twice.

Shape suffixes: N new tokens of any sequences, E hidden size, H query heads, G key/value heads, D
channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtk.models.attention import Attention
from mtk.models.gpt import GPT
from mtk.models.mlp import MLP
from mtk.models.rotary import rotate
from serving.paged.attention import Attend
from serving.paged.columns import in_columns, lay_out, wants_columns
from serving.paged.quantized import QuantizedStack, can_stack_quantized
from serving.paged.storage import CacheShape, Storage

Part = Callable[[Tensor], Tensor]


def can_page(model: GPT) -> bool:
    """Whether this package can run the model: keys and values are all that is kept, and
    positions go into states or queries and keys, not into scores."""
    config = model.config
    return config.family == "gpt" and not model.stateful_layers and not config.biases_scores


def cache_shape(model: GPT) -> CacheShape:
    """Of the model's cache; layers without attention need none, and a rank of several has its own
    heads only."""
    weight, config = model.output_weight, model.config
    heads = len(range(*model.own_heads.indices(config.num_attention_heads)))
    # Ranks beyond the number of groups share one.
    groups = max(1, config.query_groups * heads // config.num_attention_heads)
    layers = sum(getattr(block, "attention", None) is not None for block in model.layers.values())
    dtype, device = weight.dtype, weight.device
    return CacheShape(layers, groups, config.head_size, dtype, device, repeats=heads // groups)


@dataclass(frozen=True, eq=False)
class Tokens:
    """What a forward pass reads: ids, and where each token is in its sequence, all int64 [N].
    slots: rows of ``table_RW``, int64 [slots, blocks of a sequence], of each token's sequence.
    tables: see :func:`rotary_tables`."""

    ids_N: Tensor
    slots_N: Tensor
    positions_N: Tensor
    table_RW: Tensor
    block: int
    tables: tuple[Tensor, Tensor] | None

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Where keys and values go: blocks, and places in them."""
        blocks_N = self.table_RW[self.slots_N, self.positions_N // self.block]
        return blocks_N, self.positions_N % self.block

    @cached_property
    def rotary(self) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines [N, 1, R] of the tokens' positions, if the model rotates."""
        if self.tables is None:
            return None
        cos, sin = (table[self.positions_N][:, None] for table in self.tables)
        return cos, sin


def rotary_tables(model: GPT) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines, fp32 [positions, rotated channels], if the model rotates."""
    if model.config.position_embedding_type != "rope":
        return None
    return model.rotary_cos, model.rotary_sin  # type: ignore[return-value]


class Stacked:
    """Several linear layers of one input as one product; ``sizes`` are their widths."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.sizes = [linear.weight.shape[0] for linear in linears]
        self.weight = _joined([linear.weight for linear in linears])
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self.bias = _joined(biases) if biases else None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def can_stack(modules: Sequence[nn.Module]) -> bool:
    """Plain linear layers, all with a bias or none (adapters add something of their own)."""
    if can_stack_quantized(modules):
        return True
    plain = all(type(module) is nn.Linear for module in modules)
    return plain and len({getattr(module, "bias", None) is None for module in modules}) == 1


def stack(linears: Sequence[nn.Linear]) -> Stacked | QuantizedStack:
    """One product of layers that :func:`can_stack` says can be one."""
    return QuantizedStack(linears) if can_stack_quantized(linears) else Stacked(linears)


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    joined = torch.cat([parameter.detach() for parameter in parameters])
    if joined.dim() == 2 and wants_columns(joined):
        joined = in_columns(joined)
    parts = torch.split(joined, [parameter.shape[0] for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
    return joined


class PagedAttention:
    """An attention layer's projections, norms and rotation around attention to blocks."""

    def __init__(self, attention: Attention, layer: int) -> None:
        self.own, self.layer = attention, layer
        projections = (attention.query, attention.key, attention.value)
        self.stacked = stack(projections) if can_stack(projections) else None

    def before(self, x_NE: Tensor) -> Tensor:
        """Queries, keys and values of all heads side by side."""
        if self.stacked is not None:
            return self.stacked(x_NE)
        return torch.cat(self.own.project(x_NE, x_NE), dim=-1)

    def between(
        self,
        qkv: Tensor,
        tokens: Tokens,
        storage: Storage,
        attend: Attend,
    ) -> Tensor:
        """[N, H x D]: stores keys and values and looks at all stored so far."""
        own = self.own
        done = attend.whole(self.layer, own, qkv)
        if done is not None:
            return done.flatten(1)
        heads_ND = qkv.view(qkv.shape[0], -1, own.head_size)
        groups = storage.shape.groups
        sizes = [heads_ND.shape[1] - 2 * groups, groups, groups]
        q_NHD, k_NGD, v_NGD = torch.split(heads_ND, sizes, dim=1)
        if own.query_scale is not None:
            q_NHD = q_NHD * own.query_scale
        if own.query_norm is not None and own.key_norm is not None:
            q_NHD, k_NGD = own.query_norm(q_NHD), own.key_norm(k_NGD)
        if tokens.rotary is not None:
            q_NHD = rotate(q_NHD, *tokens.rotary, interleaved=own.interleaved)
            k_NGD = rotate(k_NGD, *tokens.rotary, interleaved=own.interleaved)
        storage.write(self.layer, tokens.places, k_NGD, v_NGD)
        return attend(self.layer, q_NHD, k_NGD, v_NGD).flatten(1)


class GatedMLP:
    """An MLP whose gate and input matrix are one product."""

    def __init__(self, mlp: MLP) -> None:
        assert mlp.gate is not None
        self.activation, self.down = mlp.activation, mlp.down
        # May be replaced by a kernel.
        self.join: Part = self._join
        self.stacked = stack((mlp.gate, mlp.up))

    def inner(self, x: Tensor) -> Tensor:
        """What ``down`` is to be multiplied with."""
        return self.join(self.stacked(x))

    def _join(self, wide: Tensor) -> Tensor:
        gate, up = wide.chunk(2, dim=-1)
        return self.activation(gate).mul_(up)


def add_product(x_NE: Tensor, inner: Tensor, linear: nn.Module) -> Tensor:
    """``x_NE`` += linear(inner); of a plain matrix in the product's own kernel."""
    if type(linear) is nn.Linear and getattr(linear, "bias", None) is None:
        return x_NE.addmm_(inner, linear.weight.T)
    return x_NE.add_(linear(inner))


def paged_mlp(mlp: nn.Module) -> GatedMLP | nn.Module:
    if type(mlp) is MLP and mlp.gate is not None and can_stack((mlp.gate, mlp.up)):
        return GatedMLP(mlp)
    return mlp


class PagedBlock:
    """One of the model's layers: attention, an MLP (or experts) or both. ``enter`` and ``leave``
    are what lies before and behind attention."""

    def __init__(self, block: nn.Module, layer: int) -> None:
        self._block = block
        own = getattr(block, "attention", None)
        mlp = getattr(block, "mlp", None)
        self.attention = None if own is None else PagedAttention(own, layer)
        self.mlp = None if mlp is None else paged_mlp(mlp)
        self.parallel: bool = getattr(block, "parallel", False)

    def enter(self, x_NE: Tensor) -> Tensor:
        assert self.attention is not None
        return self.attention.before(self.norm("attention_norm")(x_NE))

    def leave(self, x_NE: Tensor, attended: Tensor | None) -> Tensor:
        """Adds into ``x_NE``, as nobody else has it."""
        normed = self.norm("mlp_norm")(x_NE) if self.parallel else None
        if attended is not None and self.attention is not None:
            x_NE = add_product(x_NE, attended, self.attention.own.output)
        return self.feed(x_NE, normed)

    def feed(self, x_NE: Tensor, normed: Tensor | None = None) -> Tensor:
        """Adds what the MLP makes of ``normed`` (default: the norm of ``x_NE``) into ``x_NE``."""
        if self.mlp is None:
            return x_NE
        normed = self.norm("mlp_norm")(x_NE) if normed is None else normed
        if isinstance(self.mlp, GatedMLP):
            return add_product(x_NE, self.mlp.inner(normed), self.mlp.down)
        return x_NE.add_(self.mlp(normed))

    def norm(self, name: str) -> nn.Module:
        return getattr(self._block, name)  # type: ignore[no-any-return]


class PagedModel:
    """The model's forward pass over tokens of any sequences side by side."""

    def __init__(self, model: GPT, storage: Storage) -> None:
        self.model, self.storage = model, storage
        self.tables = rotary_tables(model)
        self.blocks: list[PagedBlock] = []
        layer = 0
        for block in model.layers.values():
            self.blocks.append(PagedBlock(block, layer))
            layer += self.blocks[-1].attention is not None
        # A tied one is read by rows where tokens are looked up.
        lay_out(model.output)

    def states(self, tokens: Tokens, attend: Attend) -> Tensor:
        """States [N, E] after the last layer."""
        assert self.model.embedding is not None
        return self.through(self.model.embedding(tokens.ids_N, tokens.positions_N), tokens, attend)

    def through(self, x_NE: Tensor, tokens: Tokens, attend: Attend) -> Tensor:
        """The same from embedded tokens."""
        for block in self.blocks:
            x_NE = self.layer(block, x_NE, tokens, attend)
        return x_NE

    def layer(self, block: PagedBlock, x_NE: Tensor, tokens: Tokens, attend: Attend) -> Tensor:
        """One layer; ``x_NE`` becomes its result."""
        attended = None
        if block.attention is not None:
            qkv = block.enter(x_NE)
            attended = block.attention.between(qkv, tokens, self.storage, attend)
        return block.leave(x_NE, attended)

    def logits(self, x_NE: Tensor) -> Tensor:
        """[N, V] of the token after each of ``x_NE``, states after the last layer."""
        assert self.model.final_norm is not None
        return self.model.logits(self.model.final_norm(x_NE))
