"""Named tensors that are read or computed one at a time, when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from mtk.errors import ConversionError

Tensors = Mapping[str, Tensor]

# What options call them.
DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


# Endings of what keeps its own type: rounded, biases of experts would choose other ones.
EXACT = ("router.expert_bias", "gate.e_score_correction_bias")


class LazyTensors(Mapping[str, Tensor]):
    """Names known now, contents made by ``read`` on each access and not kept.

    Views on views cost no memory, so a model of any size streams through a conversion.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        """Without reading it, as Mapping would."""
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def as_dtype(tensors: Tensors, dtype: torch.dtype | None) -> Tensors:
    """Floating-point tensors in ``dtype``; None keeps each as it is stored, as those named in
    ``EXACT`` always are.

    Reading a finite value that ``dtype`` cannot hold raises ConversionError.
    """
    if dtype is None:
        return tensors

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        if not tensor.is_floating_point() or tensor.dtype == dtype or name.endswith(EXACT):
            return tensor
        cast = tensor.to(dtype)
        if not cast.isfinite().all() and tensor.isfinite().all():
            largest = tensor.abs().max().item()
            short = str(dtype).removeprefix("torch.")
            raise ConversionError(
                f"{name} holds {largest:.4g}, more than {short} can. Use --dtype bf16 or fp32."
            )
        return cast

    return LazyTensors(tensors, read)
