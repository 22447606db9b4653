"""Fused kernels in Triton, each beside the plain version that it must equal, and copies to a device
that nothing waits for.

Triton comes with torch for CUDA and is imported by the modules here that say so, and only once a
CUDA device is there. What calls them has a plain path that runs everywhere.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether Triton is installed, which CPU builds of torch leave out."""
    return find_spec("triton") is not None


def fused_on(device: torch.device) -> bool:
    """Whether kernels of this package can run on ``device``."""
    return device.type == "cuda" and has_triton()
