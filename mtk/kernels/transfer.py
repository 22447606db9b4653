"""Copies to a device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``. From ordinary memory of the host a copy would wait until the device has
    done all that it was given before."""
    if device.type == "cuda" and x.device.type == "cpu":
        # Nothing new if it is page-locked; else its allocator keeps it until the copy is done.
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
