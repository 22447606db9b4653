"""Context parallelism on ranks: output and all gradients equal attention on whole sequences."""

from __future__ import annotations

import pytest
import torch

from mtk.parallel.context import context_kernel
from mtk.parallel.dims import Dims
from mtk.parallel.groups import Group
from mtk.parallel.ranks import make_ranks
from tests.parallel.attention_cases import HEADS, errors, make_case, on_ranks, whole
from tests.parallel.ranks import run_ranks

# Heads that eight ranks can share out.
EIGHT = {"MHA": (16, 16), "GQA": (16, 4), "MQA": (16, 1)}
METHODS = ("p2p", "all_gather", "a2a")
OUTPUT, GRADIENTS = 1e-6, 1e-5


def context_group(rank: int, cp: int) -> Group:
    return make_ranks(Dims(cp=cp), rank=rank, device=torch.device("cpu")).cp


def _errors(rank: int, method: str, cp: int, dtype: torch.dtype) -> dict[str, list[float]]:
    group = context_group(rank, cp)
    found = {}
    for name, heads in (HEADS if 12 % cp == 0 else EIGHT).items():
        for documents in (False, True):
            case = make_case(heads, 2 * cp * 5, documents=documents)
            exact = whole(case)
            for field in ("q", "k", "v", "grad"):
                setattr(case, field, getattr(case, field).to(dtype))
            parts = on_ranks(case, context_kernel(method, group), group)
            found[f"{name}, documents {documents}"] = errors(parts, exact)
    return found


def check(method: str, cp: int) -> None:
    for found in run_ranks(cp, _errors, method, cp, torch.float32):
        for name, (output, *gradients) in found.items():
            assert output <= OUTPUT, name
            assert max(gradients) <= GRADIENTS, name


@pytest.mark.parametrize("cp", [2, 3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_equals_whole_sequences(method: str, cp: int) -> None:
    check(method, cp)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_equals_whole_sequences_on_eight_ranks(method: str) -> None:
    check(method, 8)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_is_close(method: str) -> None:
    for found in run_ranks(2, _errors, method, 2, torch.bfloat16):
        assert max(max(each) for each in found.values()) < 2e-2
