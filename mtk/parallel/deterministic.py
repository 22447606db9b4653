"""Deterministic mode: two runs of the same command give identical checkpoints.

What may differ from run to run otherwise: kernels that add in no fixed order (atomics in
backward passes on CUDA), cuBLAS with several streams and workspaces of any size, cuDNN and
Inductor choosing kernels by timing them, and NCCL choosing its algorithm, NVLink SHARP among
them. The layout, the number of CPU threads and the kind of device are part of the command:
other ones may round differently.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
import torch.distributed as dist

from mtk.config.pretrain import RuntimeConfig
from mtk.errors import ConfigError, Problem

# What torch accepts (its notes on reproducibility); the first is the faster one.
CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8"))
# One algorithm, and one whose order of additions is fixed by the ranks alone.
NCCL = ("NCCL_ALGO", ("Ring", "Tree"))


def set_deterministic(
    runtime: RuntimeConfig, environment: MutableMapping[str, str] | None = None
) -> None:
    """Switch all of torch to deterministic kernels, or back to the fastest.

    To be called by each rank before anything runs on CUDA and before the process group is
    made, as cuBLAS and NCCL read their settings once; a second call changes nothing. Raises
    ConfigError for an environment or a compiler that cannot be made deterministic, ValueError
    when called too late.
    """
    environment = os.environ if environment is None else environment
    on = runtime.deterministic_mode
    if on:
        problems = list(_conflicts(runtime, environment))
        if problems:
            raise ConfigError(problems)
        if NCCL[0] not in environment and _nccl_started():
            raise ValueError("set_deterministic must come before the process group is made")
        for name, accepted in (CUBLAS, NCCL):
            environment.setdefault(name, accepted[0])
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.deterministic = on
    torch.backends.cudnn.benchmark = False
    if runtime.compile:
        _inductor_config().deterministic = on


def _conflicts(runtime: RuntimeConfig, environment: MutableMapping[str, str]) -> Iterator[Problem]:
    """Settings from outside that would undo the mode."""
    for name, accepted in (CUBLAS, NCCL):
        found = environment.get(name)
        if found is not None and found not in accepted:
            rule = f"runtime.deterministic_mode needs {' or '.join(accepted)}"
            yield Problem(name, found, rule, f"Unset it, or export {name}={accepted[0]}.")
    if runtime.compile and not hasattr(_inductor_config(), "deterministic"):
        rule = f"the compiler of torch {torch.__version__} chooses kernels by timing them"
        yield Problem("runtime.compile", True, rule, "Leave out --compile or deterministic mode.")


def _inductor_config() -> Any:
    from torch._inductor import config  # slow to import, and needed with --compile only

    return config


def _nccl_started() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_backend() != "gloo"
