"""Delayed scaling: scales of a step from the greatest magnitudes of the steps before.

As in Transformer Engine (amax history, its maximum), with two differences: a run begins with a
pass that only measures, as the first scales would be guesses; and magnitudes are those of all
ranks together, so that copies of a layer stay alike.

Shape suffixes: H steps that are remembered, R tensors that are cast on this rank.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mtk.artifacts.hashing import sha256_json
from mtk.config.float8 import Float8Options
from mtk.parallel.collectives import all_reduce
from mtk.parallel.groups import Group
from mtk.precision.float8 import TINY, Scaling
from mtk.precision.float8_casts import limit

# Where nothing is known yet: activations and weights lie well inside this range, and gradients
# of a mean over many tokens are small.
FIRST, FIRST_OF_GRADIENTS = 1.0, 2.0**16


class History:
    """The delayed scales of all layers of a rank. amaxes_HR: newest first, fp32; zeros where
    nothing was seen. key: its name in a checkpoint.

    Call it when weights are on their device. groups: ranks over which magnitudes are shared.
    """

    def __init__(
        self,
        parts: Iterable[nn.Module],
        options: Float8Options,
        device: torch.device,
        groups: Iterable[Group] = (),
    ) -> None:
        modules = [pair for part in parts for pair in part.named_modules()]
        named = {name: module for name, module in modules if isinstance(module, Scaling)}
        self.layers = list(named.values())
        # What the columns of the history belong to; another choice of layers must not take it over.
        self.key = f"float8.amaxes.{sha256_json(list(named))[:16]}"
        self.groups = tuple(group for group in groups if group.size > 1)
        counts = [len(layer.gradients) for layer in self.layers]
        for layer, count in zip(self.layers, counts, strict=True):
            layer.scale = torch.zeros(count, device=device)
            layer.amax = torch.zeros(count, device=device)
        flags = [flag for layer in self.layers for flag in layer.gradients]
        limits = [
            limit(layer.dtype(i)) for layer in self.layers for i in range(len(layer.gradients))
        ]
        self.limits_R = torch.tensor(limits, device=device) * options.margin
        firsts = [FIRST_OF_GRADIENTS if flag else FIRST for flag in flags]
        self.firsts_R = torch.tensor(firsts, device=device)
        self.counts = counts
        self.amaxes_HR = torch.zeros(options.fp8_amax_history_len, len(flags), device=device)
        self.fresh = True
        self._set_scales()

    @torch.no_grad()
    def end_step(self) -> None:
        """Take over what the layers have met since the last call."""
        met_R = torch.cat(self._buffers("amax"))
        for group in self.groups:
            met_R = all_reduce(met_R, group, f"float8.{group.name}", "max")
        self.amaxes_HR.copy_(self.amaxes_HR.roll(1, 0))
        self.amaxes_HR[0] = met_R
        self.fresh = False
        self._set_scales()

    @torch.no_grad()
    def restore(self, amaxes_HR: Tensor) -> None:
        """Continue from a checkpoint's history; one of another length is not taken over."""
        if amaxes_HR.shape == self.amaxes_HR.shape:
            self.amaxes_HR.copy_(amaxes_HR)
            self.fresh = not bool(self.amaxes_HR.any())
            self._set_scales()

    def _set_scales(self) -> None:
        highest_R = self.amaxes_HR.amax(0)
        scales_R = (self.limits_R / highest_R.clamp(min=TINY)).where(highest_R > 0, self.firsts_R)
        scales = torch.split(scales_R, self.counts)
        torch._foreach_copy_(self._buffers("scale"), list(scales))
        torch._foreach_zero_(self._buffers("amax"))

    def _buffers(self, name: str) -> list[Tensor]:
        return [layer.get_buffer(name) for layer in self.layers]
