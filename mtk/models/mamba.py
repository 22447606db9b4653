"""A Mamba-2 layer (Dao & Gu 2024): projections and a convolution around a state-space model.

Each part of the projection, and each part of the convolution, is a parameter of its own, so
that every layout cuts it by itself. What crosses ranks and what computes is injected: an
:class:`Exchange` (context parallelism) and :class:`Kernels`.

Shape suffixes: B batch, S tokens, E hidden size, H heads, P channels of a head, I = H x P
channels, G groups of B and C, N state of a channel, C channels of a convolution, W tokens it
looks at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtk.config.mamba import mamba_sizes
from mtk.config.model import ModelConfig
from mtk.models.causal_conv import Convolution, Convolve, convolve, with_inputs_before
from mtk.models.ssd import Scan, chunked, recurrent


class StateCache(Protocol):
    """What one layer remembers of sequences: the last W - 1 inputs of its convolutions
    [B, W - 1, C], those of x, B and C side by side, and its state [B, H, P, N] in fp32.

    Of constant size however long they are, and only ever that of the last token: it cannot be
    cut back to an earlier one.
    """

    def read(self) -> tuple[Tensor, Tensor] | None:
        """None before the first token."""

    def write(self, inputs: Tensor, state: Tensor) -> None: ...


@dataclass(frozen=True)
class Kernels:
    """What computes the two parts that are no matrix products."""

    convolve: Convolve = convolve
    scan: Scan = chunked


class Stream(NamedTuple):
    """What the state-space model mixes: x [B, S, I], b and c [B, S, G x N], dt [B, S, H], and
    the documents [B, S] or None."""

    x: Tensor
    b: Tensor
    c: Tensor
    dt: Tensor
    documents: Tensor | None


class Weights(NamedTuple):
    """Of the heads in a :class:`Stream`: convolutions as (weight [C, W], bias [C] or None) of
    x, b and c; step bias, logarithm of the decay rate and skip, each [H]."""

    x: tuple[Tensor, Tensor | None]
    b: tuple[Tensor, Tensor | None]
    c: tuple[Tensor, Tensor | None]
    dt_bias: Tensor
    a_log: Tensor
    skip: Tensor


class Exchange(Protocol):
    """The way of a stream to the ranks that mix its heads over whole sequences, and back."""

    def enter(self, stream: Stream, weights: Weights) -> tuple[Stream, Weights]: ...
    def leave(self, y_BSI: Tensor) -> Tensor: ...


class NoExchange:
    """This rank has whole sequences."""

    def enter(self, stream: Stream, weights: Weights) -> tuple[Stream, Weights]:
        return stream, weights

    def leave(self, y_BSI: Tensor) -> Tensor:
        return y_BSI


class GatedNorm(nn.Module):
    """RMSNorm of x * silu(gate) over each group of channels, in fp32.

    whole: makes sums of squares of a group from those of the part of it on this rank.
    """

    def __init__(self, channels: int, groups: int, epsilon: float) -> None:
        super().__init__()
        self.group_size, self.epsilon = channels // groups, epsilon
        self.weight = nn.Parameter(torch.ones(channels))
        self.whole: Callable[[Tensor], Tensor] | None = None

    def forward(self, x_BSI: Tensor, gate_BSI: Tensor) -> Tensor:
        gated = x_BSI.float() * F.silu(gate_BSI.float())
        groups = torch.unflatten(gated, -1, (-1, min(self.group_size, gated.shape[-1])))
        squares = groups.square().sum(-1, keepdim=True)
        if self.whole is not None:
            squares = self.whole(squares)
        normed = groups * torch.rsqrt(squares / self.group_size + self.epsilon)
        out: Tensor = self.weight * normed.flatten(-2).to(x_BSI.dtype)
        return out


class Mamba(nn.Module):
    """output(norm(mix(x) * silu(gate))). [B, S, E] -> [B, S, E]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes, hidden, bias = mamba_sizes(config), config.hidden_size, config.add_bias_linear
        self.head_dim, self.state_dim = sizes.head, sizes.state
        self.chunk, self.dt_limit = config.mamba_chunk_size, config.mamba_dt_limit
        self.kernels = Kernels()
        self.exchange: Exchange = NoExchange()
        self.gate = nn.Linear(hidden, sizes.width, bias=bias)
        self.input = nn.Linear(hidden, sizes.width, bias=bias)
        self.b = nn.Linear(hidden, sizes.shared, bias=bias)
        self.c = nn.Linear(hidden, sizes.shared, bias=bias)
        self.dt = nn.Linear(hidden, sizes.heads, bias=bias)
        conv_bias = config.mamba_conv_bias
        self.conv_input = Convolution(sizes.width, sizes.conv, bias=conv_bias)
        self.conv_b = Convolution(sizes.shared, sizes.conv, bias=conv_bias)
        self.conv_c = Convolution(sizes.shared, sizes.conv, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.zeros(sizes.heads))
        self.a_log = nn.Parameter(torch.zeros(sizes.heads))
        self.skip = nn.Parameter(torch.ones(sizes.heads))
        self.norm = GatedNorm(sizes.width, sizes.groups, config.norm_epsilon)
        self.output = nn.Linear(sizes.width, hidden, bias=bias)

    def forward(
        self, x_BSE: Tensor, cache: StateCache | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """cache: continue from its state and leave the new one there (not with
        ``documents``). documents: int64 [B, S], tokens look back inside their own only."""
        gate_BSI = self.gate(x_BSE)
        stream = Stream(self.input(x_BSE), self.b(x_BSE), self.c(x_BSE), self.dt(x_BSE), documents)
        if cache is not None:
            y_BSI = self._continue(stream, cache)
        else:
            stream, weights = self.exchange.enter(stream, self.weights)
            y_BSI = self.exchange.leave(self._mix(stream, weights, None, None)[0])
        return self.output(self.norm(y_BSI, gate_BSI))  # type: ignore[no-any-return]

    @property
    def weights(self) -> Weights:
        """Of this rank's heads."""
        x, b, c = self.conv_input, self.conv_b, self.conv_c
        return Weights(
            (x.weight, x.bias),
            (b.weight, b.bias),
            (c.weight, c.bias),
            self.dt_bias,
            self.a_log,
            self.skip,
        )

    def _continue(self, stream: Stream, cache: StateCache) -> Tensor:
        """From what the cache holds, and back into it."""
        before, state = cache.read() or (None, None)
        y_BSI, state = self._mix(stream, self.weights, before, state)
        inputs = torch.cat((stream.x, stream.b, stream.c), dim=-1)
        width = self.conv_input.weight.shape[1]
        cache.write(with_inputs_before(inputs, width, before)[:, 1 - width :], state)
        return y_BSI

    def _mix(
        self, stream: Stream, weights: Weights, before: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y [B, S, I] and the state after the last token."""
        documents, parts = stream.documents, (stream.x, stream.b, stream.c)
        befores: tuple[Tensor | None, ...] = (None,) * 3
        if before is not None:
            befores = torch.split(before, [part.shape[-1] for part in parts], dim=-1)
        x_BSI, b_BSC, c_BSC = (
            self.kernels.convolve(part, *conv, before=earlier, documents_BS=documents)
            for part, conv, earlier in zip(parts, weights[:3], befores, strict=True)
        )
        dt_BSH = F.softplus(stream.dt.float() + weights.dt_bias.float())
        if self.dt_limit is not None:
            dt_BSH = dt_BSH.clamp(*self.dt_limit)
        # A single token needs no matrices.
        scan = recurrent if state is not None and x_BSI.shape[1] == 1 else self.kernels.scan
        y_BSHP, state = scan(
            torch.unflatten(x_BSI, -1, (-1, self.head_dim)),
            dt_BSH,
            -weights.a_log.float().exp(),
            torch.unflatten(b_BSC, -1, (-1, self.state_dim)),
            torch.unflatten(c_BSC, -1, (-1, self.state_dim)),
            weights.skip,
            chunk=self.chunk,
            documents_BS=documents,
            state=state,
        )
        return y_BSHP.flatten(2), state
