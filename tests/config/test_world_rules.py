"""What the environment of started ranks says."""

from __future__ import annotations

import pytest

from mtk.config.world_rules import speaks


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"WORLD_SIZE": "2", "RANK": "0"}, True),
        ({"WORLD_SIZE": "2", "RANK": "1"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, True),
        # Ranks that torchrun starts inside a Slurm task.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "WORLD_SIZE": "4", "RANK": "3"}, False),
    ],
    ids=str,
)
def test_one_rank_reports_the_result(environment: dict[str, str], expected: bool) -> None:
    assert speaks(environment) is expected
