"""Apply what surrounds a model's modules, in one fixed order.

TP/SP and EP -> CP -> recompute -> per-block compile -> FSDP; pipeline stages split
before and call this for each stage. This version has one process, so recomputation and
compile are the only techniques; every other setting is refused before any work starts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mtk.config.parallel import ParallelConfig
from mtk.config.pretrain import RuntimeConfig
from mtk.errors import LayoutError, Problem
from mtk.models.gpt import GPT
from mtk.parallel.recompute import apply_recompute

# Settings that only mean something with more than one rank.
_SINGLE_PROCESS = ParallelConfig()
# Those that one process has too.
_SUPPORTED = ("recompute_granularity", "recompute_method", "recompute_num_layers")


def apply(model: GPT, parallel: ParallelConfig, runtime: RuntimeConfig) -> GPT:
    """Return ``model`` ready to train under this layout. Raises LayoutError."""
    require_supported(parallel)
    apply_recompute(model, parallel)
    if runtime.compile:
        for block in model.layers.values():
            block.compile(dynamic=False)
    return model


def require_supported(parallel: ParallelConfig) -> None:
    """Raises LayoutError; for callers that have not built a model yet, which may not fit."""
    problems = list(unsupported(parallel))
    if problems:
        raise LayoutError(problems)


def unsupported(parallel: ParallelConfig) -> Iterator[Problem]:
    """Settings that this version can plan but not run."""
    for name in vars(_SINGLE_PROCESS):
        value, only = getattr(parallel, name), getattr(_SINGLE_PROCESS, name)
        if value != only and name not in _SUPPORTED:
            rule = f"this version trains in one process and needs {only!r}"
            fix = "mtk plan costs the layout; training it comes with the parallel core."
            yield Problem(f"parallel.{name}", value, rule, fix)


def training_device(runtime: RuntimeConfig) -> torch.device:
    """The device asked for; "auto" is CUDA when there is one. Raises LayoutError."""
    available = torch.cuda.is_available()
    if runtime.device == "cuda" and not available:
        rule = "torch sees no CUDA device on this machine"
        raise LayoutError([Problem("runtime.device", "cuda", rule, "Use --device cpu.")])
    use_cuda = runtime.device == "cuda" or (runtime.device == "auto" and available)
    return torch.device("cuda" if use_cuda else "cpu")
