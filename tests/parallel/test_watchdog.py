"""The watchdog finds one flipped bit on one rank and names it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtk.errors import GateError
from mtk.parallel.dims import Dims
from mtk.parallel.groups import Group
from mtk.parallel.pieces import Piece
from mtk.parallel.ranks import Ranks, make_ranks
from mtk.parallel.watchdog import compare_copies, tensor_hash
from tests.parallel.ranks import run_ranks

NAMES = ("norm.weight", "bias", "half", "small", "step")


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "norm.weight": torch.randn(3, 7, generator=generator),
        "bias": torch.randn(5, generator=generator),
        "half": torch.randn(9, generator=generator).bfloat16(),
        "small": torch.randint(0, 255, (3,), dtype=torch.uint8, generator=generator),
        "step": torch.tensor(12),
        "own": torch.randn(2),
    }


def flip(x: Tensor, bit: int) -> None:
    """Change one bit of ``x`` in place."""
    raw = x.view(-1).view(torch.uint8)
    raw[bit // 8] ^= 1 << bit % 8


def _check(rank: int, world: int, fault: tuple[int, str, int] | None) -> str:
    dims = Dims(tp=2, dp=world // 2)
    ranks = make_ranks(dims, rank=rank, device=torch.device("cpu"))
    found = tensors()
    pieces = {
        name: Piece.whole(tuple(found[name].shape), copies=_copies(name, ranks)) for name in NAMES
    }
    if fault is not None and fault[0] == rank:
        flip(found[fault[1]], fault[2])
    try:
        compare_copies(pieces, found)
    except GateError as error:
        return str(error)
    return ""


def _copies(name: str, ranks: Ranks) -> tuple[Group, ...]:
    """Some are copies over data-parallel ranks only, the others everywhere."""
    return (ranks.shards,) if name == "bias" else (ranks.tp, ranks.shards)


def test_equal_copies_pass() -> None:
    assert run_ranks(4, _check, 4, None) == [""] * 4


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ((2, "norm.weight", 0), "norm.weight"),
        ((5, "bias", 5 * 32 - 1), "bias"),
        ((1, "half", 77), "half"),
        ((3, "small", 11), "small"),
        ((0, "step", 63), "step"),
    ],
)
def test_a_flipped_bit_is_named(fault: tuple[int, str, int], named: str) -> None:
    messages = run_ranks(6, _check, 6, fault)
    # Three data-parallel ranks make a majority: 0, 2, 4 or 1, 3, 5.
    for rank, message in enumerate(messages):
        if rank % 2 == fault[0] % 2:
            assert f"{named} (rank {fault[0]} against the others of shards)" in message
            assert not any(other in message for other in NAMES if other != named)
    told = messages[fault[0] ^ 1]
    assert ("no majority" in told) == (named != "bias")


def test_two_ranks_have_no_majority() -> None:
    messages = run_ranks(2, _check, 2, (1, "half", 3))
    assert all("half (no majority among ranks 0, 1 of tp)" in message for message in messages)


def test_one_rank_compares_nothing() -> None:
    compare_copies({"x": Piece.whole((2,))}, {"x": torch.zeros(2), "y": torch.zeros(1)})


def test_every_single_bit_and_any_swap_change_the_hash() -> None:
    x = torch.randn(40)
    whole = tensor_hash(x)
    assert torch.equal(whole, tensor_hash(x.clone()))
    seen = {int(whole)}
    for bit in range(40 * 32):
        changed = x.clone()
        flip(changed, bit)
        seen.add(int(tensor_hash(changed)))
    for index in range(39):
        changed = x.clone()
        changed[[index, index + 1]] = x[[index + 1, index]]
        seen.add(int(tensor_hash(changed)))
    assert len(seen) == 1 + 40 * 32 + 39


def test_hash_of_long_views_and_empty_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtk.parallel.watchdog.CHUNK", 64)
    x = torch.randn(1000)
    hashes = {int(tensor_hash(part)) for part in (x, x[1:], x[:-1], x.view(10, 100).T)}
    assert len(hashes) == 4
    changed = x.clone()
    flip(changed, 999 * 32 + 31)
    assert tensor_hash(changed) != tensor_hash(x)
    assert tensor_hash(torch.zeros(0)) != tensor_hash(torch.zeros(1))
    assert tensor_hash(torch.zeros(1)) != tensor_hash(torch.zeros(2))
    assert torch.equal(tensor_hash(x[3:7]), tensor_hash(x[3:7].clone()))
