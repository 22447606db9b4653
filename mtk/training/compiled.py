"""Whether a training's blocks are compiled, and how the compiler is set up for it."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

import torch

from mtk.config.pretrain import PretrainConfig

CACHE = "TORCHINDUCTOR_CACHE_DIR"


def compiles(config: PretrainConfig, device: torch.device) -> bool:
    """As asked for; else on CUDA wherever it is known to work and to be as exact as asked."""
    runtime, model = config.runtime, config.model
    if runtime.compile is not None or device.type != "cuda":
        return bool(runtime.compile)
    parallel, plain = config.parallel, model.family == "gpt" and not model.has_mamba
    delayed = parallel.pipeline_schedule in ("zero-bubble", "zbv")
    travelling = parallel.expert_model_parallel_size > 1  # how many tokens come is not known
    adapted = model.lora.lora_rank is not None
    return plain and not (delayed or travelling or adapted or runtime.deterministic_mode)


def keep_compiled(environment: MutableMapping[str, str] | None = None) -> None:
    """Let compiled kernels outlive this boot: torch's own place for them is the folder for
    temporary files. To be called before anything is compiled; what the user set stays."""
    environment = os.environ if environment is None else environment
    base = environment.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    environment.setdefault(CACHE, str(Path(base) / "mtk" / "inductor"))
