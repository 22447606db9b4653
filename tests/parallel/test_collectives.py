"""Groups have the right members and every collective does what its docstring says."""

from __future__ import annotations

import torch

from mtk.parallel import collectives
from mtk.parallel.dims import Dims
from mtk.parallel.groups import Group, NoTrace
from mtk.parallel.ranks import AXES, make_ranks
from tests.parallel.ranks import run_ranks


def test_axes_of_a_layout() -> None:
    dims = Dims(tp=2, cp=2, dp=2, pp=2, ep=2)
    assert dims.world == 16
    assert dims.partition("tp")[0] == (0, 1)
    assert dims.partition("cp")[0] == (0, 2)
    assert dims.partition("dp")[0] == (0, 4)
    assert dims.partition("pp")[0] == (0, 8)
    assert dims.partition("shards")[0] == (0, 2, 4, 6)
    assert dims.partition("ep")[0] == (0, 2)
    assert dims.partition("expert_shards")[0] == (0, 4)
    assert dims.partition("ends")[3] == (3, 11)
    for axis in AXES:
        ranks = [rank for group in dims.partition(axis) for rank in group]
        assert sorted(ranks) == list(range(16)), axis
    for rank in range(16):
        assert dims.rank(**dims.coordinates(rank)) == rank


def _groups(rank: int) -> dict[str, tuple[int, ...]]:
    dims = Dims(tp=2, dp=2, pp=2)
    ranks = make_ranks(dims, rank=rank, device=torch.device("cpu"), kv_groups=1)
    assert ranks.shards_mesh is not None
    assert ranks.shards_mesh.size(0) == 1
    return {axis: getattr(ranks, axis).ranks for axis in (*AXES, "kv")}


def test_groups_of_ranks() -> None:
    results = run_ranks(8, _groups)
    assert results[5]["tp"] == (4, 5)
    assert results[5]["pp"] == (1, 5)
    assert results[5]["shards"] == (5, 7)
    assert results[5]["kv"] == (4, 5)


def _collectives(rank: int) -> None:
    group = make_ranks(Dims(tp=2), rank=rank, device=torch.device("cpu")).tp
    x = torch.arange(4.0).reshape(4, 1) + 10 * rank
    assert collectives.all_reduce(x, group, "test").flatten().tolist() == [10, 12, 14, 16]
    assert collectives.all_reduce(x, group, "test", "max").flatten().tolist() == [10, 11, 12, 13]
    joined = [0, 1, 2, 3, 10, 11, 12, 13]
    assert collectives.all_gather(x, group, "test").flatten().tolist() == joined
    parts = [10, 12] if rank == 0 else [14, 16]
    assert collectives.reduce_scatter(x, group, "test").flatten().tolist() == parts
    send, receive = ([4, 0], [4, 0]) if rank == 0 else ([0, 4], [0, 4])
    assert torch.equal(collectives.exchange(x, receive, send, group, "test"), x)
    send, receive = ([1, 3], [1, 2]) if rank == 0 else ([2, 2], [3, 2])
    moved = [0, 10, 11] if rank == 0 else [1, 2, 3, 12, 13]
    assert collectives.exchange(x, receive, send, group, "test").flatten().tolist() == moved


def test_collectives() -> None:
    run_ranks(2, _collectives)


def _shift(rank: int) -> None:
    group = make_ranks(Dims(cp=3), rank=rank, device=torch.device("cpu")).cp
    for step in (1, 2, -1, 4):
        x = torch.full((2, 3), float(rank)).t()  # not contiguous
        number = torch.tensor([rank])
        flying = [collectives.shift((x + 10 * k, number), group, "test", step) for k in range(3)]
        source = (rank - step) % 3
        for k, each in enumerate(flying):
            moved, moved_number = each.wait()
            assert moved.shape == (3, 2) and moved.eq(source + 10 * k).all()
            assert moved_number.tolist() == [source]
            assert each.wait()[0] is moved
    alone = (torch.ones(1),)
    assert collectives.shift(alone, Group("one"), "test").wait()[0] is alone[0]
    # Whatever follows works as before.
    assert collectives.all_reduce(torch.ones(1), group, "test").item() == 3


def test_shifts_around_the_ring() -> None:
    run_ranks(3, _shift)


class Notes(NoTrace):
    """A trace that keeps all it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def enter(self, site: str, group: str) -> None:
        self.told.append(f"{site} {group}")

    def leave(self) -> None:
        self.told.append("left")


def _noted(rank: int) -> list[str]:
    notes = Notes()
    group = make_ranks(Dims(cp=2), rank=rank, device=torch.device("cpu"), trace=notes).cp
    flying = collectives.shift((torch.ones(1),), group, "test.ring")
    notes.told.append("meanwhile")
    flying.wait()
    return notes.told


def test_a_shift_is_noted_where_it_may_hang() -> None:
    told = ["test.ring cp", "left", "meanwhile", "test.ring cp", "left"]
    assert run_ranks(2, _noted) == [told, told]
