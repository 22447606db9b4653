"""Attention kernels other than PyTorch's own choice, by the names of ``--attention-backend``.

PyTorch's implementations one by one or in an order; FlashAttention 3 and 4 in the place of its
flash attention; the packages flash-attn (Dao 2023) and Transformer Engine (NVIDIA). Packages
are accelerators, never requirements: they are imported when asked for by name.

Shape suffixes: as in :mod:`mtk.models.attention`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend
from torch.nn.attention import sdpa_kernel as limited_to

from mtk.config.attention_rules import BACKENDS, KEY, AttentionBackend
from mtk.errors import LayoutError, Problem
from mtk.models.attention import CAUSAL, AttentionKernel, Form, sdpa_kernel

IMPLEMENTATIONS: Mapping[str, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# What PyTorch calls the newer flash attentions, and the major compute capabilities they run on.
REPLACEMENTS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "flash3": ("FA3", (9,)),
    "flash4": ("FA4", (9, 10)),
}


def named_kernel(backend: AttentionBackend, device: torch.device) -> AttentionKernel:
    """The kernel of a back-end (of "auto" too: PyTorch's own choice).

    Raises LayoutError where its package is not installed, or has nothing for this GPU.
    """
    restore_flash()
    if backend in REPLACEMENTS:
        return _replaced_flash(backend, device)
    if backend == "flash-attn":
        return FlashAttnKernel(_imported(backend, "flash_attn", "flash_attn_func"))
    if backend == "transformer-engine":
        make = _imported(backend, "transformer_engine.pytorch", "DotProductAttention")
        return TransformerEngineKernel(make)
    return ordered(backend) if backend in IMPLEMENTATIONS else sdpa_kernel


def ordered(*backends: str) -> TorchKernel:
    """PyTorch's attention, by the first of ``backends`` that takes the tensors, or an error."""
    return TorchKernel(
        tuple(IMPLEMENTATIONS[name] for name in backends),
        spreads=backends[0] == "efficient",
        keeps_scores=backends[0] == "math",
    )


@dataclass(frozen=True)
class TorchKernel:
    """:func:`mtk.models.attention.sdpa_kernel` limited to ``order``, in that order.

    spreads: repeat keys and values for each query head, as the memory-efficient kernel knows
    no groups. keeps_scores: for backward, unless later ones in the order have to serve.

    The order is set around each call, not once a process, so that it reaches neither other
    models nor serving, and so that torch.compile, which picks the implementation while it
    traces, sees it: torch 2.11 to 2.13 trace this context manager without a break. Backward
    follows what forward picked.
    """

    order: tuple[SDPBackend, ...]
    spreads: bool = False
    keeps_scores: bool = False

    def __call__(
        self,
        q_BHSD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        *,
        mask: Tensor | None,
        dropout: float,
        documents: Tensor | None = None,
        form: Form = CAUSAL,
        bias: Tensor | None = None,
    ) -> Tensor:
        if self.spreads and q_BHSD.shape[1] != k_BGTD.shape[1]:
            repeats = q_BHSD.shape[1] // k_BGTD.shape[1]
            k_BGTD = k_BGTD.repeat_interleave(repeats, dim=1)
            v_BGTD = v_BGTD.repeat_interleave(repeats, dim=1)
        with limited_to(list(self.order), set_priority=True):
            return sdpa_kernel(
                q_BHSD,
                k_BGTD,
                v_BGTD,
                mask=mask,
                dropout=dropout,
                documents=documents,
                form=form,
                bias=bias,
            )


def restore_flash() -> None:
    """PyTorch's own flash attention again, where another one took its place."""
    if torch_attention.current_flash_attention_impl() is not None:
        torch_attention.restore_flash_attention_impl()


def _replaced_flash(backend: AttentionBackend, device: torch.device) -> AttentionKernel:
    name, majors = REPLACEMENTS[backend]
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found[0] not in majors:
            wanted = " or ".join(f"{major}.0" for major in majors)
            rule = f"needs a GPU of compute capability {wanted}, not {found[0]}.{found[1]}"
            raise LayoutError([Problem(KEY, backend, rule, "Use --attention-backend auto.")])
    try:
        torch_attention.activate_flash_attention_impl(name)
    # torch says ValueError for a name it lacks, RuntimeError for a package of another build.
    except (ImportError, AttributeError, RuntimeError, ValueError) as error:
        raise _absent(backend, f"torch cannot activate {name}", error) from error
    return ordered("flash")


def _imported(backend: AttentionBackend, module: str, name: str) -> Callable[..., Any]:
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    # OSError: a shared library of CUDA that does not load.
    except (ImportError, AttributeError, OSError) as error:
        raise _absent(backend, f"{module}.{name} cannot be imported", error) from error
    return found


def _absent(backend: AttentionBackend, what: str, error: Exception) -> LayoutError:
    fix = f"Install {BACKENDS[backend].source} for this torch, or use --attention-backend auto."
    return LayoutError([Problem(KEY, backend, f"{what} ({error})", fix)])


def _no_masks(title: str, arguments: Sequence[Tensor | None]) -> None:
    if any(argument is not None for argument in arguments):
        raise ValueError(f"{title} knows no masks, documents or biases")


def _tokens_first(x_BHSD: Tensor) -> Tensor:
    """[B, S, H, D], as both packages want it."""
    return x_BHSD.transpose(1, 2)


@dataclass(frozen=True)
class FlashAttnKernel:
    """function: ``flash_attn.flash_attn_func``; causal attention, windows, groups, dropout."""

    function: Callable[..., Any]
    keeps_scores: ClassVar[bool] = False

    # Opaque to the compiler, which fuses what lies around it.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self,
        q_BHSD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        *,
        mask: Tensor | None,
        dropout: float,
        documents: Tensor | None = None,
        form: Form = CAUSAL,
        bias: Tensor | None = None,
    ) -> Tensor:
        _no_masks("flash-attn", (mask, documents, bias))
        out_BSHD: Tensor = self.function(
            _tokens_first(q_BHSD),
            _tokens_first(k_BGTD),
            _tokens_first(v_BGTD),
            dropout_p=dropout,
            causal=form.causal,
            # Tokens before and after the query's own; -1: all.
            window_size=(-1, -1) if form.window is None else (form.window - 1, 0),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return out_BSHD.transpose(1, 2)


@dataclass(frozen=True)
class TransformerEngineKernel:
    """make: ``transformer_engine.pytorch.DotProductAttention``, a module without parameters.

    modules: those made so far, one for each shape and form. They are kept here, not in the
    model: they would add states of their own to its checkpoints.
    """

    make: Callable[..., Any]
    modules: dict[tuple[Any, ...], Any] = field(default_factory=dict, compare=False, repr=False)
    keeps_scores: ClassVar[bool] = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self,
        q_BHSD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        *,
        mask: Tensor | None,
        dropout: float,
        documents: Tensor | None = None,
        form: Form = CAUSAL,
        bias: Tensor | None = None,
    ) -> Tensor:
        _no_masks("Transformer Engine's attention", (mask, documents, bias))
        module = self._module(q_BHSD.shape[1], k_BGTD.shape[1], q_BHSD.shape[3], dropout, form)
        # Contiguous, else it looks for tensors packed together by their addresses.
        inputs = (_tokens_first(x).contiguous() for x in (q_BHSD, k_BGTD, v_BGTD))
        out_BSE: Tensor = module(*inputs)
        out_BSHD = out_BSE.view(*out_BSE.shape[:2], q_BHSD.shape[1], -1)
        return out_BSHD.transpose(1, 2)

    def _module(self, heads: int, groups: int, size: int, dropout: float, form: Form) -> Any:
        key = (heads, groups, size, dropout, form)
        if key not in self.modules:
            self.modules[key] = self.make(
                heads,
                size,
                num_gqa_groups=groups,
                attention_dropout=dropout,
                qkv_format="bshd",
                attn_mask_type="causal" if form.causal else "no_mask",
                window_size=None if form.window is None else (form.window - 1, 0),
            )
        return self.modules[key]
