"""Batch-size ramp-up against the golden values of the reference."""

from __future__ import annotations

import pytest

from mtk.data.batch_schedule import BatchSchedule


@pytest.mark.parametrize(
    ("consumed", "batch"),
    [(0, 16), (2380, 16), (2381, 24), (150000, 520), (300000, 1024), (300001, 1024), (10**9, 1024)],
)
def test_golden_ramp(consumed: int, batch: int) -> None:
    assert BatchSchedule(1024, (16, 8, 300000)).at(consumed) == batch


def simulate(schedule: BatchSchedule, samples: int) -> list[int]:
    done, consumed = [], 0
    while consumed + schedule.at(consumed) <= samples:
        consumed += schedule.at(consumed)
        done.append(consumed)
    return done


@pytest.mark.parametrize("rampup", [None, (2, 2, 50), (4, 4, 1), (12, 1, 500), (1, 11, 333)])
@pytest.mark.parametrize("samples", [0, 1, 11, 12, 50, 51, 332, 333, 334, 1000])
def test_steps_equal_a_simulation(rampup: tuple[int, int, int] | None, samples: int) -> None:
    schedule = BatchSchedule(12, rampup)
    done = simulate(schedule, samples)
    assert schedule.steps(samples) == len(done)
    assert [schedule.consumed(step + 1) for step in range(len(done))] == done
    assert schedule.consumed(0) == 0


def test_constant_batch() -> None:
    schedule = BatchSchedule(8)
    assert (schedule.at(5), schedule.steps(100), schedule.consumed(3)) == (8, 12, 24)


def test_start_equal_to_the_full_batch() -> None:
    assert BatchSchedule(8, (8, 4, 100)).at(0) == 8


@pytest.mark.parametrize("rampup", [(16, 8, 100), (3, 2, 100), (0, 1, 100), (2, 0, 5), (2, 2, 0)])
def test_impossible_ramps(rampup: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="ramp-up"):
        BatchSchedule(8, rampup)
