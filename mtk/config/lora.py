"""Options of low-rank adapters (Hu et al. 2021) and their rules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mtk.config.schema import option
from mtk.errors import Problem

if TYPE_CHECKING:
    from mtk.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Pairs of matrices beside chosen linear layers: W x + alpha / rank B A x, W frozen."""

    lora_rank: int | None = option(
        None, help="Rank of the adapters; the model itself is frozen (default: all is trained)."
    )
    lora_alpha: float | None = option(
        None, help="Their output is scaled by alpha / rank (default: as the rank)."
    )
    lora_dropout: float = option(0.0, help="Dropout on what goes into the adapters.")
    lora_targets: Literal["attention", "mlp", "all"] = option(
        "attention",
        help="Linear layers that get one: query, key, value and output of the attention, those "
        "of the MLP, or both.",
    )

    @property
    def scale(self) -> float:
        """alpha / rank; needs ``lora_rank``."""
        assert self.lora_rank is not None
        return (self.lora_rank if self.lora_alpha is None else self.lora_alpha) / self.lora_rank

    def has(self, part: Literal["attention", "mlp"]) -> bool:
        """Whether linear layers of this part of a block have adapters."""
        return self.lora_rank is not None and self.lora_targets in (part, "all")

    def problems(self) -> Iterator[Problem]:
        if self.lora_rank is None:
            unset = LoraConfig()
            for name in ("lora_alpha", "lora_dropout", "lora_targets"):
                if getattr(self, name) != getattr(unset, name):
                    rule = "only means something with --lora-rank"
                    yield Problem(name, getattr(self, name), rule, "Leave it out.")
            return
        if self.lora_rank < 1:
            yield Problem("lora_rank", self.lora_rank, "must be at least 1", "Nearest: 8.")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            rule = "must be greater than 0 and finite"
            yield Problem("lora_alpha", self.lora_alpha, rule, f"Usual: {2 * self.lora_rank}.")
        if not 0 <= self.lora_dropout < 1:
            yield Problem("lora_dropout", self.lora_dropout, "must be in [0, 1)")

    def derived(self) -> LoraConfig:
        if self.lora_rank is None or self.lora_alpha is not None:
            return self
        return LoraConfig(
            lora_rank=self.lora_rank,
            lora_alpha=float(self.lora_rank),
            lora_dropout=self.lora_dropout,
            lora_targets=self.lora_targets,
        )


def lora_problems(model: ModelConfig) -> Iterator[Problem]:
    """What of the model its adapters do not fit."""
    lora = model.lora
    if lora.lora_rank is None:
        return
    if lora.has("mlp") and model.num_experts is not None:
        rule = "experts are one grouped matrix multiply, which has no adapters"
        yield Problem("lora.lora_targets", lora.lora_targets, rule, "Nearest: attention.")
    pattern = model.hybrid_layer_pattern
    kinds = {"attention": "*", "mlp": "-"}
    wanted = [mark for part, mark in kinds.items() if lora.lora_targets in (part, "all")]
    if pattern is not None and not any(mark in pattern for mark in wanted):
        rule = f"names layers that hybrid_layer_pattern = {pattern!r} has none of"
        yield Problem("lora.lora_targets", lora.lora_targets, rule, "Train all: no --lora-rank.")
    widths = {"hidden_size": model.hidden_size}
    if lora.has("attention"):
        widths["num_query_groups x kv_channels"] = model.query_groups * model.head_size
    if lora.has("mlp"):
        widths["ffn_hidden_size"] = model.ffn_size
    name, least = min(widths.items(), key=lambda item: item[1])
    if lora.lora_rank > least:
        rule = f"exceeds {name} = {least}: the adapter would be larger than the matrix"
        yield Problem("lora.lora_rank", lora.lora_rank, rule, f"Nearest: {least}.")
