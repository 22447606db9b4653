"""The data cursor: any stop, any number of ranks, one order."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from mtk.data.batch_schedule import BatchSchedule
from mtk.data.sampler import batch_indices, micro_batches
from mtk.errors import ConfigError


def test_ranks_get_slices_of_each_chunk() -> None:
    assert batch_indices(100, 8, 2, rank=0, world=2).tolist() == [[100, 101], [104, 105]]
    assert batch_indices(100, 8, 2, rank=1, world=2).tolist() == [[102, 103], [106, 107]]


@pytest.mark.parametrize("batch", [0, 6, 9])
def test_uneven_batches(batch: int) -> None:
    with pytest.raises(ConfigError, match=r"multiple of micro_batch_size .* = 4.*Nearest: (4|8)"):
        batch_indices(0, batch, 2, rank=0, world=2)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        batch_indices(0, 8, 2, rank=2, world=2)


def run(schedule: BatchSchedule, consumed: int, steps: int, world: int) -> tuple[list, int]:
    """Ids of each step in global order, gathered from all ranks, and the new cursor."""
    out = []
    for _ in range(steps):
        size = schedule.at(consumed)
        ranks = [batch_indices(consumed, size, 2, rank, world) for rank in range(world)]
        step = np.stack(ranks, axis=1).reshape(-1)  # micro-step, rank, sample
        out.append(step.tolist())
        consumed += size
    return out, consumed


def test_the_order_is_the_same_on_any_number_of_ranks() -> None:
    schedule = BatchSchedule(32, (8, 8, 200))
    whole, _ = run(schedule, 0, 30, world=1)
    assert list(chain(*whole)) == list(range(sum(len(step) for step in whole)))
    elastic: list = []
    consumed = 0
    for world, steps in ((4, 7), (2, 5), (1, 11), (4, 7)):
        part, consumed = run(schedule, consumed, steps, world)
        elastic += part
    assert elastic == whole


def test_twenty_five_stops_give_the_same_ids() -> None:
    rng = np.random.default_rng(0)
    schedule = BatchSchedule(16, (4, 4, 300))
    whole, _ = run(schedule, 0, 200, world=1)
    stops = sorted(rng.choice(np.arange(1, 200), size=25, replace=False).tolist())
    pieces: list = []
    for begin, end in zip([0, *stops], [*stops, 200], strict=True):
        # A restart knows nothing but the number of steps done.
        part, _ = run(
            schedule, schedule.consumed(begin), end - begin, world=int(rng.integers(1, 3))
        )
        pieces += part
    assert pieces == whole


def test_micro_batches_stop_before_the_end() -> None:
    schedule = BatchSchedule(8, (4, 4, 10))
    found = [b.tolist() for b in micro_batches(0, 31, schedule.at, 4)]
    assert list(chain(*found)) == list(range(28))
    assert schedule.steps(31) == 5  # 4 + 4 + 4, then 8 + 8
    resumed = [b.tolist() for b in micro_batches(12, 31, schedule.at, 4)]
    assert found[3:] == resumed
    ranks = [[b.tolist() for b in micro_batches(0, 16, lambda _: 16, 2, r, 4)] for r in range(4)]
    assert ranks[1] == [[2, 3], [10, 11]]
    assert sorted(chain(*chain(*ranks))) == list(range(16))
