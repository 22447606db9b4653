"""Activation recomputation: what backward needs is computed again instead of kept.

Selective (Korthikanti et al. 2022, section 5) recomputes the core of the attention: scores,
softmax, its dropout; of a Mamba layer the scan with its matrices of decays. Full keeps the
input of a unit of layers only: ``uniform`` makes units of ``recompute_num_layers`` from all
layers of a stage; ``block`` recomputes that many first layers of each stage, one by one, and
keeps the others whole. Nothing is recomputed unless asked for.

A fused attention kernel (flash, memory-efficient, cuDNN) keeps no scores. Where one runs,
selective recomputation has nothing to save and therefore does nothing, so that
``--use-flash-attn --recompute-activations`` costs no second attention.

Random numbers are the same the second time, on CPU and CUDA, so that results do not depend on
what is recomputed. Works with blocks that are compiled or are FSDP units of their own: units
lie around them, and what recomputes a unit calls its blocks as the first forward did.

Shape suffixes: B batch, S tokens, E hidden size, H query heads, G key/value heads, D channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from mtk.config.parallel import ParallelConfig
from mtk.models.attention import (
    CAUSAL,
    AttentionKernel,
    Form,
    score_mask,
    sdpa_kernel,
    spreads_groups,
)
from mtk.models.gpt import GPT, AnyCache, Memory, run_in_order
from mtk.models.ssd import Scan


def apply_recompute(model: GPT, parallel: ParallelConfig) -> None:
    """Make ``model``, or the stage of one, recompute as ``parallel`` says.

    To be called once, after the attention kernel is in place and before compile and FSDP.
    """
    if parallel.recompute_granularity == "selective":
        for block in model.layers.values():
            _recompute_core(block)
    elif parallel.recompute_granularity == "full":
        units = units_of(
            len(model.layers), parallel.recompute_method, parallel.recompute_num_layers or 1
        )
        config = model.config
        dropout = config.hidden_dropout or config.attention_dropout or config.lora.lora_dropout
        places = {id(block): place for place, block in enumerate(model.layers.values())}
        model.run_layers = RecomputedLayers(units, places, random=bool(dropout))


def _recompute_core(block: Any) -> None:
    if block.attention is not None:
        block.attention.kernel = recomputed(block.attention.kernel)
    mamba = getattr(block, "mamba", None)
    if mamba is not None:
        scan = RecomputedScan(mamba.kernels.scan)
        mamba.kernels = dataclasses.replace(mamba.kernels, scan=scan)


# -- full ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """``layers`` of a stage by position; ``recomputed``: only the input of the first is kept."""

    layers: range
    recomputed: bool


def units_of(layers: int, method: str | None, size: int) -> tuple[Unit, ...]:
    """A stage of ``layers`` layers cut into units."""
    if method == "uniform":
        starts = range(0, layers, size)
        return tuple(Unit(range(start, min(start + size, layers)), True) for start in starts)
    return tuple(Unit(range(layer, layer + 1), layer < size) for layer in range(layers))


@dataclass(frozen=True)
class RecomputedLayers:
    """The :class:`mtk.models.gpt.LayerRunner` of full recomputation.

    places: of each block (by ``id``) in the stage; a call may be for some blocks in a row only.
    random: layers draw random numbers, whose state is kept with each unit's input; reading it
    makes the host wait for the GPU, so it is left where nothing is drawn.
    """

    units: tuple[Unit, ...]
    places: Mapping[int, int]
    random: bool

    def __call__(
        self,
        blocks: Sequence[nn.Module],
        x_BSE: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        caches: Sequence[AnyCache] | None,
        documents: Tensor | None,
        bias: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        if caches is not None or not torch.is_grad_enabled():
            return run_in_order(blocks, x_BSE, rotary, mask, caches, documents, bias, memory)
        here = {self.places[id(block)]: block for block in blocks}
        for unit in self.units:
            chosen = [here[layer] for layer in unit.layers if layer in here]
            if not chosen:
                continue
            run = partial(_checkpointed, random=self.random) if unit.recomputed else _plain
            inputs = (x_BSE, rotary, mask, None, documents, bias, memory)
            x_BSE = run(partial(run_in_order, chosen), *inputs)
        return x_BSE


def _plain(function: Any, *inputs: Any) -> Any:
    return function(*inputs)


def _checkpointed(function: Any, *inputs: Any, random: bool) -> Any:
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=random)


# -- selective ----------------------------------------------------------------------------


def recomputed(kernel: AttentionKernel) -> AttentionKernel:
    """``kernel`` without its scores kept. A dataclass that wraps another (``inner``) keeps its
    own collectives outside; one that keeps no scores says so by ``keeps_scores = False``."""
    if not getattr(kernel, "keeps_scores", True):
        return kernel
    inner = getattr(kernel, "inner", None)
    if inner is not None:
        wrapping: Any = kernel
        wrapped: AttentionKernel = dataclasses.replace(wrapping, inner=recomputed(inner))
        return wrapped
    return RecomputedKernel(kernel)


@dataclass(frozen=True)
class RecomputedKernel:
    """An attention kernel that keeps queries, keys and values only."""

    kernel: AttentionKernel

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
        run = partial(self.kernel, mask=mask, dropout=dropout, documents=documents, form=form)
        fused = self._fused(q_BHSD, k_BGTD, v_BGTD, mask, dropout, documents, form, bias)
        if not torch.is_grad_enabled() or fused:
            return run(q_BHSD, k_BGTD, v_BGTD, bias=bias)

        def again(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            return run(q, k, v, bias=bias)

        out: Tensor = _checkpointed(again, q_BHSD, k_BGTD, v_BGTD, bias, random=dropout > 0)
        return out

    def _fused(
        self,
        q_BHSD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        mask: Tensor | None,
        dropout: float,
        documents: Tensor | None,
        form: Form,
        bias: Tensor | None,
    ) -> bool:
        """PyTorch would choose an implementation that keeps no scores."""
        if self.kernel is not sdpa_kernel or torch.compiler.is_compiling():
            return False
        mask = score_mask(q_BHSD, mask, documents, form, bias)
        if spreads_groups(q_BHSD, k_BGTD, mask):
            # Only shapes and strides decide.
            k_BGTD = k_BGTD[:, :1].expand(-1, q_BHSD.shape[1], -1, -1)
            v_BGTD = v_BGTD[:, :1].expand(-1, q_BHSD.shape[1], -1, -1)
        choice: int = torch._fused_sdp_choice(
            q_BHSD,
            k_BGTD,
            v_BGTD,
            mask,
            dropout,
            mask is None and form.causal,
            enable_gqa=q_BHSD.shape[1] != k_BGTD.shape[1],
        )
        return choice != SDPBackend.MATH.value


@dataclass(frozen=True)
class RecomputedScan:
    """A scan of ``mtk.models.ssd`` that keeps its inputs only."""

    scan: Scan

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
        run = partial(self.scan, chunk=chunk, documents_BS=documents_BS, state=state)
        inputs = (x_BSHP, dt_BSH, a_H, b_BSGN, c_BSGN, skip_H)
        if not torch.is_grad_enabled():
            return run(*inputs)
        out: tuple[Tensor, Tensor] = _checkpointed(run, *inputs, random=False)
        return out
