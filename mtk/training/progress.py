"""Where a run stands: the counters that a checkpoint carries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass
class RunProgress:
    """consumed_samples is the data cursor; scheduled_samples only counts applied steps,
    because a skipped fp16 step must not move the learning rate. interval_*: sums since
    the last log line, so that a resumed run logs what an uninterrupted one would."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    scheduled_samples: int = 0
    skipped_steps: int = 0
    interval_steps: int = 0
    interval_loss: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(**data)
