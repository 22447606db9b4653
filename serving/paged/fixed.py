"""Steps of fixed shapes, so that a sequence's numbers are the same bits in any company.

Sums are rounded in an order that a library picks by the shape of a product: with one row more
each of the others may come out a bit differently, and once in a while another token is the
likeliest (He 2025, "Defeating nondeterminism in LLM inference"). Here

- a step of decoding always has the same number of rows, the rest filled up, and that number is one
  with which the library gives a row the same bits in all places, which is tried when the engine
  starts;
- prompts are read in windows of one size that begin at multiples of it, each in a pass of its own
  in which a token has its place whatever of the window is known already;
- attention looks at each sequence by itself, or at all of the context.

Shape suffixes: N tokens of a window, S rows of a step, T keys, P tokens of a block, G, H heads of
keys and queries, D channels of a head, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mtk.errors import ConfigError, Problem
from mtk.models.attention import Attention, Form, sdpa_kernel
from serving.paged.storage import Storage

# Tokens of a window: few on a host, where those that fill it up cost time.
HOST_WINDOW, GPU_WINDOW = 64, 256
# How many rows more than asked for are tried.
TRIED = 64


@dataclass(frozen=True)
class WindowAttention:
    """A window's queries to the ``blocks_W`` of one sequence up to the window's end. start: the
    window's first position. end: tokens that the sequence has when this is read."""

    storage: Storage
    blocks_W: Tensor
    start: int
    end: int
    form: Form

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        length = self.start + q_NHD.shape[0]
        stores = self.storage.keys_KGPD[layer], self.storage.values_KGPD[layer]
        k, v = (store[self.blocks_W].transpose(0, 1).flatten(1, 2) for store in stores)
        # What an earlier sequence left behind may be NaN, which a mask alone does not hide.
        k[:, self.end :], v[:, self.end :] = 0, 0
        queries_N = torch.arange(self.start, length, device=q_NHD.device)
        gaps_NT = queries_N[:, None] - torch.arange(length, device=q_NHD.device)
        mask = gaps_NT >= 0
        if self.form.window is not None:
            mask = mask & (gaps_NT < self.form.window)
        k, v = k[None, :, :length], v[None, :, :length]
        out = sdpa_kernel(q_NHD.transpose(0, 1)[None], k, v, mask=mask, dropout=0.0)
        return out[0].transpose(0, 1)

    def whole(self, layer: int, own: Attention, qkv: Tensor) -> Tensor | None:
        return None


class NoAttention:
    """Queries instead of what they find: all of a model's layers but attention itself."""

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        return q_NHD

    def whole(self, layer: int, own: Attention, qkv: Tensor) -> Tensor:
        width = own.output.weight.shape[1]
        return qkv[:, :width].reshape(len(qkv), -1, own.head_size)


def steady_rows(logits_of: Callable[[Tensor], Tensor], rows: int, vocab: int) -> int:
    """The smallest number from ``rows`` on with which all rows of one token get the same bits.

    logits_of: of token ids [S] at position 0, without attention. Raises ConfigError if there is
    none near.
    """
    for size in range(rows, rows + TRIED):
        if all(_alike(logits_of, size, token) for token in range(0, vocab, max(1, vocab // 3))):
            return size
    rule = f"no step of {rows} to {rows + TRIED - 1} rows gives the same bits in each of its rows"
    fix = "Give another --max-batch-size, --num-threads or --tp, or leave --deterministic-mode out."
    raise ConfigError([Problem("cache.deterministic_mode", True, rule, fix)])


def _alike(logits_of: Callable[[Tensor], Tensor], size: int, token: int) -> bool:
    logits_SV = logits_of(torch.full((size,), token))
    return bool((logits_SV == logits_SV[:1]).all())
