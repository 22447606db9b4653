"""What a step of decoding costs, by how many tokens it computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """In steps of one token. A step of n > 1 tokens costs ``several`` + n x ``each``: products of
    one row are made by kernels of their own, and a few rows more cost little. wait: what a step
    costs besides if the tokens of the one before must be known when it is launched."""

    several: float
    each: float
    wait: float

    def plain(self, tokens: int) -> float:
        return 1.0 if tokens == 1 else self.several + tokens * self.each

    def guessed(self, tokens: int) -> float:
        """Of a step with guesses, the guesses among its tokens."""
        return self.plain(tokens) + self.wait


# Of a model of 20 M parameters on one thread of an EPYC (fp32), and of one of 1.5 B on an H200
# (bf16), 1 to 32 rows. Fixed numbers, not measured when serving: the same requests are to
# be computed in the same steps.
HOST = StepCost(several=1.55, each=0.08, wait=0.05)
GPU = StepCost(several=1.25, each=0.018, wait=0.5)


def step_cost(device: torch.device) -> StepCost:
    return GPU if device.type == "cuda" else HOST
