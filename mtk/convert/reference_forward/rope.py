"""Rotation of heads, scaled or not, one frequency after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtk.errors import ConversionError


class Rotation:
    """Turns the first channels of heads [B, S, D] of tokens 0..S-1.

    depth: D. share: of the channels, where ``config`` does not say.
    """

    def __init__(self, config: Mapping[str, Any], depth: int, share: float = 1.0) -> None:
        self._rope: dict[str, Any] = dict(
            config.get("rope_scaling") or config.get("rope_parameters") or {}
        )
        theta = config.get("rope_theta", config.get("rotary_emb_base"))
        self._theta = float(self._rope.get("rope_theta") or theta or 10000.0)
        top = "rotary_pct" if config["model_type"] == "gpt_neox" else "partial_rotary_factor"
        share = float(config.get(top, share))
        share = float(self._rope.get("partial_rotary_factor") or share)
        self._channels = int(depth * share)
        self._longest = int(config.get("max_position_embeddings") or 2048)
        self._original = int(
            config.get("original_max_position_embeddings")
            or self._rope.get("original_max_position_embeddings")
            or self._longest
        )
        self._kind = str(self._rope.get("rope_type") or self._rope.get("type") or "default")

    def __call__(self, x_BSD: Tensor) -> Tensor:
        half = self._channels // 2
        angles_SF = self._angles(x_BSD.shape[1]).to(x_BSD.device)
        first, second = x_BSD[..., :half], x_BSD[..., half : 2 * half]
        # Channel pairs (c, c + half) are points of a plane, turned by position x frequency.
        turned = torch.complex(first, second) * torch.polar(
            torch.full_like(angles_SF, self._length()), angles_SF
        )
        return torch.cat((turned.real, turned.imag, x_BSD[..., 2 * half :]), dim=-1)

    def _angles(self, length: int) -> Tensor:
        # fp32 throughout, as models are trained: exact angles would differ from any of them.
        exponents_F = torch.arange(0, self._channels, 2).float() / self._channels
        plain = (1.0 / self._theta**exponents_F).tolist()
        scaled = [self._scaled(value, index) for index, value in enumerate(plain)]
        return torch.arange(length).float()[:, None] * torch.tensor(scaled).float()

    def _scaled(self, frequency: float, index: int) -> float:
        if self._kind == "default":
            return frequency
        factor = float(self._rope.get("factor") or self._longest / self._original)
        if self._kind == "linear":
            return frequency / factor
        if self._kind == "llama3":
            return self._llama3(frequency, factor)
        if self._kind == "yarn":
            kept = 1.0 - self._ramp(index)
            return frequency * kept + frequency / factor * (1.0 - kept)
        raise ConversionError(f"no reference for rope_type {self._kind!r}")

    def _llama3(self, frequency: float, factor: float) -> float:
        low, high = float(self._rope["low_freq_factor"]), float(self._rope["high_freq_factor"])
        wavelength = 2 * math.pi / frequency
        if wavelength < self._original / high:
            return frequency
        if wavelength > self._original / low:
            return frequency / factor
        smooth = (self._original / wavelength - low) / (high - low)
        return (1 - smooth) * frequency / factor + smooth * frequency

    def _ramp(self, index: int) -> float:
        """0: not scaled, 1: scaled in full (yarn)."""
        bounds = []
        for turns in (self._rope.get("beta_fast") or 32, self._rope.get("beta_slow") or 1):
            length = self._original / (float(turns) * 2 * math.pi)
            bounds.append(self._channels * math.log(length) / (2 * math.log(self._theta)))
        start, end = bounds
        if self._rope.get("truncate", True):
            start, end = math.floor(start), math.ceil(end)
        start, end = max(start, 0), min(end, self._channels - 1)
        if start == end:
            end += 0.001
        return min(max((index - start) / (end - start), 0.0), 1.0)

    def _length(self) -> float:
        """What yarn stretches each point by."""
        if self._kind != "yarn":
            return 1.0
        stated = self._rope.get("attention_factor")
        if stated is not None:
            return float(stated)
        factor = float(self._rope.get("factor") or self._longest / self._original)
        above = float(self._rope.get("mscale") or 0.0)
        below = float(self._rope.get("mscale_all_dim") or 0.0)
        if factor <= 1:
            return 1.0
        if above and below:
            return (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)
        return 0.1 * math.log(factor) + 1
