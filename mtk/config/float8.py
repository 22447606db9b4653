"""Options of training in FP8, under Megatron-LM's names where it has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mtk.config.schema import option
from mtk.errors import Problem

if TYPE_CHECKING:
    from mtk.config.model import ModelConfig

# The scaled products of cuBLAS take sizes in steps of this only.
STEP = 16


@dataclass(frozen=True, kw_only=True)
class Float8Options:
    """Linear layers of the decoder's blocks in FP8; all else stays in bf16."""

    fp8_format: Literal["none", "e4m3", "hybrid"] = option(
        "none",
        help="FP8 of linear layers: hybrid has gradients in E5M2 and all else in E4M3.",
        shortcuts=(("--fp8", "hybrid"),),
    )
    fp8_recipe: Literal["tensorwise", "delayed"] = option(
        "tensorwise",
        help="Scale each tensor by its own greatest magnitude, or (a pass less over each) by "
        "that of the steps before.",
    )
    fp8_amax_history_len: int = option(16, help="Steps that delayed scaling looks back.")
    fp8_margin: int | None = option(
        None,
        help="Leave this many powers of 2 of the range unused (default: 2 with delayed scaling, "
        "for what grows from step to step, else 0).",
    )
    fp8_min_size: int = option(
        512, help="Layers with fewer inputs or outputs stay in bf16: casts would cost more."
    )
    num_layers_at_start_in_bf16: int = option(0, help="First layers that stay in bf16.")
    num_layers_at_end_in_bf16: int = option(0, help="Last layers that stay in bf16.")

    @property
    def margin(self) -> float:
        """What the greatest number of a format is multiplied by before scales are made of it."""
        delayed = self.fp8_recipe == "delayed"
        return 2.0 ** -((2 if delayed else 0) if self.fp8_margin is None else self.fp8_margin)

    @property
    def fp8(self) -> bool:
        return self.fp8_format != "none"

    def float8_problems(self, precision: str) -> Iterator[Problem]:
        """Rules among these options and the compute format."""
        if not self.fp8:
            unset = Float8Options()
            for name in vars(unset):
                if getattr(self, name) != getattr(unset, name):
                    rule = "only means something with --fp8"
                    yield Problem(name, getattr(self, name), rule, "Leave it out.")
            return
        if precision != "bf16":
            rule = "needs bf16 for all that is not in FP8"
            yield Problem("fp8_format", self.fp8_format, rule, "Add --bf16.")
        for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16", "fp8_margin"):
            if (getattr(self, name) or 0) < 0:
                yield Problem(name, getattr(self, name), "must not be negative", "Nearest: 0.")
        for name in ("fp8_amax_history_len", "fp8_min_size"):
            if getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be at least 1", "Nearest: 1.")


def float8_training_problems(
    options: Float8Options, model: ModelConfig, schedule: str | None, tokens: int
) -> Iterator[Problem]:
    """Rules between FP8 and the rest of a training. tokens: of a rank's micro-batch."""
    if not options.fp8:
        return
    key, found = "precision.fp8_format", options.fp8_format
    if model.family != "gpt":
        rule = f"is for decoders; {model.family} stays in bf16"
        yield Problem(key, found, rule, "Leave out --fp8.")
    if model.lora.lora_rank is not None:
        rule = "trains all weights; adapters stay in bf16"
        yield Problem(key, found, rule, "Leave out --fp8, or --lora-rank.")
    if schedule in ("zero-bubble", "zbv"):
        rule = f"has no weight gradients that {schedule} could delay"
        yield Problem(key, found, rule, "Use --pipeline-schedule 1f1b or interleaved.")
    if tokens % STEP:
        rule = f"needs a multiple of {STEP} tokens in a rank's micro-batch; there are {tokens}"
        fix = f"Nearest: {max(STEP, tokens // STEP * STEP)}; change --seq-length."
        yield Problem(key, found, rule, fix)
