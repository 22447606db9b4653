"""Every schedule on every number of ranks and micro-batches equals one process."""

from __future__ import annotations

import pytest

from mtk.parallel.collectives import all_reduce
from mtk.parallel.dims import Dims
from mtk.parallel.ranks import make_ranks
from tests.parallel.pipelines import (
    CPU,
    Case,
    loss_over,
    make_batches,
    make_pipeline,
    one_process,
    sum_tied,
    worst,
)
from tests.parallel.ranks import run_ranks


def cases(world: int) -> list[Case]:
    """All schedules with counts 1 to 8, even and odd ones on different cuts; kinds of models
    are dealt out over them."""
    even, twice, thrice = (2,) * world, (1,) * (2 * world), (1,) * (3 * world)
    uneven = (3, *(1,) * (world - 2), 2)[:world]
    layouts = [
        ("1f1b", even),
        ("1f1b", uneven),
        ("interleaved", twice),
        ("interleaved", thrice if world == 2 else twice),
        ("zero-bubble", twice),
        ("zero-bubble", uneven),
        ("zbv", twice),
        ("zbv", (2, *(1,) * (2 * world - 1))),
    ]
    found = []
    for index, (schedule, split) in enumerate(layouts):
        for count in range(1 + index % 2, 9, 2):
            tied, rope = count // 2 % 2 == 0, count // 4 % 2 == 0
            packed = (index + count // 2) % 3 == 0
            found.append(Case(schedule, split, count, tied=tied, rope=rope, packed=packed))
    return found


def _equal(rank: int, world: int) -> list[tuple[Case, dict[str, float]]]:
    ranks = make_ranks(Dims(pp=world), rank=rank, device=CPU)
    wrong = []
    for case in cases(world)[:: 5 if world == 1 else 1]:
        batches = make_batches(case.count, packed=case.packed)
        total, model = one_process(case.config, batches)
        pipeline = make_pipeline(case, ranks)
        loss = pipeline.run(batches, loss_over(batches))
        sum_tied(case, pipeline, ranks)
        found = worst(pipeline, ranks, total, loss, model)
        evaluated = all_reduce(pipeline.evaluate(batches, loss_over(batches)), ranks.pp, "test")
        if abs(evaluated - total) > 1e-6 * abs(total):
            found["evaluate"] = float(evaluated - total)
        if found:
            wrong.append((case, found))
    return wrong


slow = pytest.mark.slow


@pytest.mark.parametrize("world", [1, 2, pytest.param(3, marks=slow), pytest.param(4, marks=slow)])
def test_equals_one_process(world: int) -> None:
    for wrong in run_ranks(world, _equal, world):
        assert wrong == []
