"""How many bytes a forward pass keeps for backward: counted, not estimated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Any], kept_anyway: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that ``forward``'s graph keeps, each counted once.

    kept_anyway: tensors that are no activations, such as parameters, buffers and inputs.
    Works on any device; what a custom function keeps outside of ``save_for_backward`` is not
    seen.
    """
    seen = {_address(tensor) for tensor in kept_anyway}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        if _address(tensor) not in seen:
            seen.add(_address(tensor))
            total += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # Held until the count is done: a freed address would be used, and counted, again.
        out = forward()
    del out
    return total


def _address(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
