"""A decoder and its training as one would write them in plain PyTorch, with nothing of mtk's.

It is what mtk's speed is compared with, so it does what a careful person would: fused query,
key and value, PyTorch's fused attention (cuDNN's first), autocast, fused AdamW, the whole model
with its loss compiled. Shapes: b batch, t tokens, h hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True)
class Sizes:
    """groups: key/value heads. positions: rows of learned positions, 0 for rotary ones of
    ``rope_base``, or for none where that is 0 too. activation: gelu, gelu-tanh or swiglu."""

    layers: int
    hidden: int
    heads: int
    groups: int
    head: int
    ffn: int
    vocab: int
    positions: int
    rope_base: float
    rms: bool
    epsilon: float
    activation: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied: bool


def norm(s: Sizes) -> nn.Module:
    kind = nn.RMSNorm if s.rms else nn.LayerNorm
    return kind(s.hidden, eps=s.epsilon)


class Attention(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.s = s
        self.qkv = nn.Linear(s.hidden, (s.heads + 2 * s.groups) * s.head, bias=s.qkv_bias)
        self.out = nn.Linear(s.heads * s.head, s.hidden, bias=s.output_bias)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        s, (b, t, _) = self.s, x.shape
        qkv = self.qkv(x)
        if s.heads == s.groups:
            q, k, v = qkv.view(b, t, 3, s.heads, s.head).permute(2, 0, 3, 1, 4)
        else:
            sizes = [s.heads * s.head, s.groups * s.head, s.groups * s.head]
            q, k, v = (
                part.view(b, t, -1, s.head).transpose(1, 2) for part in qkv.split(sizes, dim=-1)
            )
        if cos is not None and sin is not None:
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        grouped = s.heads != s.groups
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.out(a.transpose(1, 2).reshape(b, t, -1))  # type: ignore[no-any-return]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class MLP(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.activation = s.activation
        if s.activation == "swiglu":
            self.gate = nn.Linear(s.hidden, s.ffn, bias=s.mlp_bias)
        self.up = nn.Linear(s.hidden, s.ffn, bias=s.mlp_bias)
        self.down = nn.Linear(s.ffn, s.hidden, bias=s.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]
        kind = "tanh" if self.activation == "gelu-tanh" else "none"
        return self.down(F.gelu(self.up(x), approximate=kind))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = norm(s), Attention(s), norm(s), MLP(s)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class PlainModel(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.tokens = nn.Embedding(s.vocab, s.hidden)
        self.positions = nn.Embedding(s.positions, s.hidden) if s.positions else None
        self.rope_base, self.head = s.rope_base, s.head
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = norm(s)
        self.output = None if s.tied else nn.Linear(s.hidden, s.vocab, bias=False)
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None

    def make_rotary(self, length: int, device: torch.device) -> None:
        """Tables of cosines and sines, [length, head]."""
        if not self.rope_base:
            return
        channels = torch.arange(0, self.head, 2, device=device).float() / self.head
        at = torch.arange(length, device=device).float()
        angles = at[:, None] / self.rope_base**channels
        angles = torch.cat((angles, angles), dim=-1)
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of all tokens [b, t]."""
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        weight = self.tokens.weight if self.output is None else self.output.weight
        logits = F.linear(self.norm(x), weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


class PlainTraining:
    """model: on its device. bf16: compute under autocast, with fp32 weights."""

    def __init__(
        self,
        model: PlainModel,
        *,
        lr: float,
        betas: tuple[float, float],
        epsilon: float,
        weight_decay: float,
        clip: float,
        bf16: bool,
        compiled: bool,
    ) -> None:
        self.model, self.clip, self.bf16 = model, clip, bf16
        self.device = model.tokens.weight.device.type
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr, betas, epsilon, weight_decay, fused=True
        )
        self.loss: Any = torch.compile(model, dynamic=False) if compiled else model

    def step(
        self,
        batches: Sequence[tuple[Tensor, Tensor]],
        lr: float,
        mark: Callable[[str], None] = lambda name: None,
    ) -> Tensor:
        """Train on micro-batches of tokens and labels; returns the mean loss."""
        total = torch.zeros((), device=self.device)
        for tokens, labels in batches:
            mark("forward")
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16), self._backends():
                loss = self.loss(tokens, labels) / len(batches)
            mark("backward")
            loss.backward()
            total += loss.detach()
        mark("optimizer")
        if self.clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _backends(self) -> AbstractContextManager[Any]:
        if self.device != "cuda":
            return nullcontext()
        return sdpa_kernel(BACKENDS, set_priority=True)
