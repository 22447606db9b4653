"""State of a model that no gradient moves but checkpoints keep: its persistent buffers."""

from __future__ import annotations

from torch import Tensor, nn


def kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers by name (rotary tables are none: they are computed, not kept)."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def kept_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that a checkpoint of weights holds: parameters and persistent buffers by name."""
    return {**dict(model.named_parameters()), **kept_buffers(model)}
