"""A model's layers over tokens of many sequences side by side, without padding.

The modules and weights are the model's own. Matrices that read the same input become rows of
one, so that a step of decoding has fewer and larger products; the model's own then are views of
it, and nothing is kept twice.

Shape suffixes: N new tokens of any sequences, E hidden size, H query heads, G key/value heads, D
channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtk.models.attention import Attention
from mtk.models.gpt import GPT
from mtk.models.mlp import MLP
from mtk.models.rotary import rotate
from serving.paged.attention import Attend
from serving.paged.storage import CacheShape, Storage

Rotary = tuple[Tensor, Tensor] | None
Part = Callable[[Tensor], Tensor]


def can_page(model: GPT) -> bool:
    """Whether this package can run the model: keys and values are all that is kept, and
    positions go into states or queries and keys, not into scores."""
    config = model.config
    return config.family == "gpt" and not model.stateful_layers and not config.biases_scores


def cache_shape(model: GPT) -> CacheShape:
    """Of the model's cache; layers without attention need none."""
    weight, config = model.output_weight, model.config
    layers = sum(getattr(block, "attention", None) is not None for block in model.layers.values())
    return CacheShape(layers, config.query_groups, config.head_size, weight.dtype, weight.device)


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
    plain = all(type(module) is nn.Linear for module in modules)
    return plain and len({getattr(module, "bias", None) is None for module in modules}) == 1


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    joined = torch.cat([parameter.detach() for parameter in parameters])
    parts = torch.split(joined, [parameter.shape[0] for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
    return joined


class PagedAttention:
    """An attention layer's projections, norms and rotation around attention to blocks."""

    def __init__(self, attention: Attention, layer: int) -> None:
        self._own, self.layer = attention, layer
        projections = (attention.query, attention.key, attention.value)
        self.stacked = Stacked(projections) if can_stack(projections) else None

    def before(self, x_NE: Tensor) -> Tensor:
        """Queries, keys and values of all heads side by side."""
        if self.stacked is not None:
            return self.stacked(x_NE)
        return torch.cat(self._own.project(x_NE, x_NE), dim=-1)

    def between(
        self,
        qkv: Tensor,
        rotary: Rotary,
        storage: Storage,
        places: tuple[Tensor, Tensor],
        attend: Attend,
    ) -> Tensor:
        """[N, H x D]: stores keys and values and looks at all stored so far."""
        own = self._own
        heads_ND = qkv.view(qkv.shape[0], -1, own.head_size)
        groups = storage.shape.groups
        sizes = [heads_ND.shape[1] - 2 * groups, groups, groups]
        q_NHD, k_NGD, v_NGD = torch.split(heads_ND, sizes, dim=1)
        if own.query_scale is not None:
            q_NHD = q_NHD * own.query_scale
        if own.query_norm is not None and own.key_norm is not None:
            q_NHD, k_NGD = own.query_norm(q_NHD), own.key_norm(k_NGD)
        if rotary is not None:
            q_NHD = rotate(q_NHD, *rotary, interleaved=own.interleaved)
            k_NGD = rotate(k_NGD, *rotary, interleaved=own.interleaved)
        storage.write(self.layer, places, k_NGD, v_NGD)
        return attend(self.layer, q_NHD, k_NGD, v_NGD).flatten(1)

    def after(self, attended: Tensor) -> Tensor:
        return self._own.output(attended)  # type: ignore[no-any-return]


class GatedMLP:
    """An MLP whose gate and input matrix are one product."""

    def __init__(self, mlp: MLP) -> None:
        assert mlp.gate is not None
        self._own, self.stacked = mlp, Stacked((mlp.gate, mlp.up))

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.stacked(x).chunk(2, dim=-1)
        return self._own.down(self._own.activation(gate) * up)  # type: ignore[no-any-return]


def paged_mlp(mlp: nn.Module) -> Part:
    if type(mlp) is MLP and mlp.gate is not None and can_stack((mlp.gate, mlp.up)):
        return GatedMLP(mlp)
    return mlp


class PagedBlock:
    """One of the model's layers: attention, an MLP (or experts) or both. ``enter`` and ``leave``
    are what lies before and behind attention; they may be replaced by compiled ones."""

    def __init__(self, block: nn.Module, layer: int) -> None:
        self._block = block
        own = getattr(block, "attention", None)
        mlp = getattr(block, "mlp", None)
        self.attention = None if own is None else PagedAttention(own, layer)
        self.mlp = None if mlp is None else paged_mlp(mlp)
        self.parallel: bool = getattr(block, "parallel", False)
        self.enter: Part = self._enter
        self.leave: Callable[[Tensor, Tensor | None], Tensor] = self._leave

    def _enter(self, x_NE: Tensor) -> Tensor:
        assert self.attention is not None
        return self.attention.before(self._norm("attention_norm", x_NE))

    def _leave(self, x_NE: Tensor, attended: Tensor | None) -> Tensor:
        inner = x_NE
        if attended is not None and self.attention is not None:
            inner = x_NE + self.attention.after(attended)
        if self.mlp is None:
            return inner
        return inner + self.mlp(self._norm("mlp_norm", x_NE if self.parallel else inner))

    def _norm(self, name: str, x_NE: Tensor) -> Tensor:
        return getattr(self._block, name)(x_NE)  # type: ignore[no-any-return]


class PagedModel:
    """The model's forward pass over tokens [N] of any sequences, to states after the last norm."""

    def __init__(self, model: GPT, storage: Storage) -> None:
        self.model, self.storage = model, storage
        self.blocks: list[PagedBlock] = []
        layer = 0
        for block in model.layers.values():
            self.blocks.append(PagedBlock(block, layer))
            layer += self.blocks[-1].attention is not None

    def hidden(
        self, tokens_N: Tensor, positions_N: Tensor, places: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        """States [N, E]. places: where each token's keys and values go."""
        model = self.model
        assert model.embedding is not None and model.final_norm is not None
        x_NE = model.embedding(tokens_N, positions_N)
        rotary = self._rotary(positions_N)
        for block in self.blocks:
            attended = None
            if block.attention is not None:
                qkv = block.enter(x_NE)
                attended = block.attention.between(qkv, rotary, self.storage, places, attend)
            x_NE = block.leave(x_NE, attended)
        return model.final_norm(x_NE)  # type: ignore[no-any-return]

    def _rotary(self, positions_N: Tensor) -> Rotary:
        if self.model.config.position_embedding_type != "rope":
            return None
        cos, sin = self.model.rotary_cos, self.model.rotary_sin
        return cos[positions_N][:, None], sin[positions_N][:, None]  # type: ignore[index]
