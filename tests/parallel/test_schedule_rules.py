"""The rule for the number of micro-batches is exactly what torch's schedules accept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.stage import _PipelineStageBase

from mtk.config.world_rules import schedule_takes

CLASSES: dict[str, Any] = {
    "1f1b": schedules.Schedule1F1B,
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zero-bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
}


class Stage(_PipelineStageBase):
    """What a schedule looks at when it plans, without a process group."""

    def __init__(self, index: int, stages: int, ranks: int) -> None:
        self.stage_index, self.num_stages, self.group_size = index, stages, ranks
        self.group_rank, self.has_backward, self.group = 0, True, None
        self.submod = torch.nn.Identity()
        self.stage_index_to_group_rank = {i: i % ranks for i in range(stages)}

    _create_grad_recv_info = _prepare_forward_infra = _prepare_backward_infra = None  # type: ignore[assignment]


def torch_takes(schedule: str, ranks: int, each: int, micro_batches: int) -> bool:
    stages = [Stage(index, ranks * each, ranks) for index in range(0, ranks * each, ranks)]
    given: Any = stages[0] if schedule == "1f1b" else stages
    try:
        CLASSES[schedule](given, micro_batches, loss_fn=lambda out, label: out)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("schedule", "each"),
    [("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zero-bubble", 1), ("zbv", 2)],
)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_torch_agrees(schedule: str, each: int, ranks: int) -> None:
    for micro_batches in range(1, 13):
        ours = schedule_takes(schedule, ranks, micro_batches)
        assert ours == torch_takes(schedule, ranks, each, micro_batches), micro_batches
