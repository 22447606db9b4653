"""Fused chunk kernels that return the log-sum-exp, and the choice among them.

On CUDA: cuDNN's attention (fastest on Hopper) and flash attention (Dao 2023), bf16 and fp16.
On the CPU: PyTorch's flash attention. Documents and other types take the written-out formula.
All of them are PyTorch's own operators; they are opaque to ``torch.compile`` (see
:mod:`mtk.parallel.context`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtk.parallel.context_chunks import (
    ChunkKernel,
    Documents,
    MathChunks,
    per_group,
    per_head,
)

aten = torch.ops.aten


class CpuFlashChunks:
    """PyTorch's flash attention for the CPU."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        _no_documents(documents)
        repeats = q.shape[1] // k.shape[1]
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, per_head(k, repeats), per_head(v, repeats), 0.0, causal
        )
        return out, lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _no_documents(documents)
        repeats = q.shape[1] // k.shape[1]
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, per_head(k, repeats), per_head(v, repeats), out, lse, 0.0, causal
        )
        return dq, per_group(dk, repeats), per_group(dv, repeats)


class FlashChunks:
    """Flash attention on CUDA; knows grouped keys."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        _no_documents(documents)
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
        return out, lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _no_documents(documents)
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # without dropout not read
        lengths = (None, None, q.shape[2], k.shape[2])
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), *lengths, 0.0, causal, seed, seed[0]
        )
        return dq, dk, dv


class CudnnChunks:
    """cuDNN's fused attention; knows grouped keys."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        _no_documents(documents)
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)
        return out, lse.view(q.shape[:3])

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _no_documents(documents)
        seed = torch.empty((), dtype=torch.int64, device=q.device)  # without dropout not read
        lse_BHQ1 = lse.contiguous()[..., None]
        lengths = (None, None, q.shape[2], k.shape[2])
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse_BHQ1, seed, seed, None, *lengths, 0.0, causal
        )
        return dq, dk, dv


def chunk_kernel(q: Tensor, k: Tensor, v: Tensor, documents: bool) -> ChunkKernel:
    """The fastest kernel for these tensors; with documents, one that knows them."""
    if documents:
        return MathChunks()
    if q.device.type == "cpu":
        return CpuFlashChunks() if q.dtype in (torch.float32, torch.bfloat16) else MathChunks()
    if q.device.type != "cuda" or q.shape[-1] % 8:
        return MathChunks()
    # Also follows the user's torch.backends.cuda switches and deterministic mode.
    asked = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, True)
    if torch.backends.cuda.can_use_cudnn_attention(asked):
        return CudnnChunks()
    if torch.backends.cuda.can_use_flash_attention(asked):
        return FlashChunks()
    return MathChunks()


def named_chunks(backend: str, device: torch.device) -> ChunkKernel | None:
    """The kernel of an attention back-end that has one for blocks (other ones are refused by
    the configuration's rules); None: :func:`chunk_kernel` picks."""
    if backend == "math":
        return MathChunks()
    if device.type != "cuda":
        return None
    if backend == "cudnn":
        return CudnnChunks()
    return FlashChunks() if backend == "flash" else None


def _no_documents(documents: Documents | None) -> None:
    if documents is not None:
        raise ValueError("this kernel knows no packed documents; use MathChunks")
