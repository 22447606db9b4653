"""Bytes of all storages that are alive on this rank, and the most there ever were."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Smaller new storages do not make it count again.
NOTABLE = 4096


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is made inside of the block, each storage once, until it is freed.

    A storage is asked for its size whenever one is counted, as FSDP2 empties storages that it
    keeps. The allocator's profiler would miss whatever gloo's threads free.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, weakref.ref[Any]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local tensors come here by themselves
        out = func(*args, **(kwargs or {}))
        fresh = [self._note(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if max(fresh, default=0) >= NOTABLE:
            self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self) -> int:
        """Of all storages alive now."""
        alive = (reference() for reference in list(self._storages.values()))
        return sum(storage.nbytes() for storage in alive if storage is not None)

    def begin(self) -> None:
        """The peak is counted from here on."""
        self.peak = self.bytes()

    def _note(self, tensor: Tensor) -> int:
        """Bytes of the tensor's storage where it is new, else 0."""
        if isinstance(tensor, DTensor) or tensor.device.type == "meta":
            return 0
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._storages.get(key)
        if known is not None and known() is storage:
            return 0
        self._storages[key] = weakref.ref(storage)
        return storage.nbytes()
