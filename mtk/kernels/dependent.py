"""Kernels that are launched before the one in front of them has ended (programmatic dependent
launch of Hopper and later GPUs).

A kernel says at once that its successor may start; the successor does what needs nothing of its
predecessors, such as reading weights, and waits for their end before it touches anything else.
Starting a kernel then costs no time of its own, which counts where kernels take microseconds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


@lru_cache
def launches_early(device: torch.device) -> bool:
    """Whether kernels on ``device`` can be launched so."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device, *, early: bool = True) -> dict[str, Any]:
    """Arguments of a launch of a kernel with the parameter EARLY. early: False for one that must
    not start before the others have ended."""
    early = early and launches_early(device)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}
