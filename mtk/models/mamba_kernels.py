"""The CUDA kernels of mamba-ssm and causal-conv1d (Dao & Gu) behind the model's own interfaces.

Accelerators, never requirements: imported when asked for by name, and checked here only as far
as their documented signatures go.

Shape suffixes: as in ``mtk.models.ssd`` and ``mtk.models.causal_conv``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtk.errors import LayoutError, Problem
from mtk.models.gpt import GPT
from mtk.models.mamba import Kernels, Mamba

MODULES = {
    "causal_conv1d": "causal_conv1d_fn",
    "mamba_ssm.ops.triton.ssd_combined": "mamba_chunk_scan_combined",
}


def use_kernels(model: GPT, backend: str) -> None:
    """Give all Mamba layers the kernels of ``backend`` (``RuntimeConfig.mamba_backend``).

    Raises LayoutError where the packages are not installed.
    """
    layers = [module for module in model.modules() if isinstance(module, Mamba)]
    if backend == "torch" or not layers:
        return
    kernels = fast_kernels()
    for layer in layers:
        layer.kernels = kernels


def fast_kernels() -> Kernels:
    """Raises LayoutError, naming the package that is missing."""
    found: list[Callable[..., Any]] = []
    for module, name in MODULES.items():
        try:
            found.append(getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError) as error:
            rule = f"{module}.{name} cannot be imported ({error})"
            fix = "Install the packages mamba-ssm and causal-conv1d, or use --mamba-backend torch."
            raise LayoutError([Problem("runtime.mamba_backend", "mamba-ssm", rule, fix)]) from error
    convolution, scan = found
    return Kernels(FastConvolution(convolution), FastScan(scan))


@dataclass(frozen=True)
class FastConvolution:
    """A ``Convolve``. function: ``causal_conv1d_fn``, which takes channels before tokens."""

    function: Callable[..., Any]

    def __call__(
        self,
        x_BSC: Tensor,
        weight_CW: Tensor,
        bias_C: Tensor | None,
        *,
        before: Tensor | None = None,
        documents_BS: Tensor | None = None,
    ) -> Tensor:
        out: Tensor = self.function(
            x_BSC.transpose(1, 2),
            weight_CW,
            bias_C,
            seq_idx=_numbers(documents_BS),
            initial_states=None if before is None else before.to(x_BSC.dtype).transpose(1, 2),
            activation="silu",
        )
        return out.transpose(1, 2)


@dataclass(frozen=True)
class FastScan:
    """A ``Scan``. function: ``mamba_chunk_scan_combined``."""

    function: Callable[..., Any]

    def __call__(
        self,
        x_BSHP: Tensor,
        dt_BSH: Tensor,
        a_H: Tensor,
        b_BSGN: Tensor,
        c_BSGN: Tensor,
        skip_H: Tensor,
        *,
        chunk: int,
        documents_BS: Tensor | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        y_BSHP, last = self.function(
            x_BSHP,
            dt_BSH,
            a_H,
            b_BSGN,
            c_BSGN,
            chunk,
            D=skip_H,
            seq_idx=_numbers(documents_BS),
            initial_states=state,
            return_final_states=True,
        )
        return y_BSHP, last


def _numbers(documents_BS: Tensor | None) -> Tensor | None:
    return None if documents_BS is None else documents_BS.to(torch.int32)
