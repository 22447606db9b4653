"""The arithmetic of chunks, without processes: which pairs meet, kernels, merging."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from mtk.parallel import context_chunks
from mtk.parallel.context_balance import by_rank, cut, in_order, local_positions
from mtk.parallel.context_chunks import Block, ChunkKernel, MathChunks, Merge
from mtk.parallel.context_fused import (
    CpuFlashChunks,
    CudnnChunks,
    FlashChunks,
    chunk_kernel,
    named_chunks,
)
from mtk.parallel.context_gather import gather_blocks
from mtk.parallel.context_ring import ring_block
from mtk.parallel.groups import Group
from tests.parallel.attention_cases import HEADS, errors, make_case, whole
from tests.parallel.context_in_one_process import gathered, parts, ring

SIZES = (1, 2, 3, 4, 8)


def group(rank: int, cp: int) -> Group:
    return Group("cp", tuple(range(cp)), rank)


def test_head_tail_positions() -> None:
    found = [local_positions(12, group(rank, 3)).tolist() for rank in range(3)]
    assert found == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert local_positions(12, group(0, 1)).tolist() == list(range(12))
    with pytest.raises(ValueError, match="14 does not divide over 2 x 3"):
        local_positions(14, group(0, 3))


@pytest.mark.parametrize("cp", SIZES)
def test_orders_are_inverse(cp: int) -> None:
    x = torch.arange(2 * 2 * cp * 3).reshape(2, 2 * cp * 3)
    side_by_side = torch.cat(parts(x, cp, 1), 1)
    assert torch.equal(in_order(side_by_side, cp, 1), x)
    assert torch.equal(by_rank(x, cp, 1), side_by_side)
    assert torch.equal(in_order(by_rank(x.t(), cp, 0), cp, 0), x.t())


def pairs(block: Block, queries: torch.Tensor, keys: torch.Tensor) -> list[tuple[int, int]]:
    """Global positions of the queries and keys that meet in a block."""
    own, others = queries[block.queries].tolist(), keys[block.keys].tolist()
    return [
        (query, key)
        for i, query in enumerate(own)
        for j, key in enumerate(others)
        if not block.causal or j <= i
    ]


@pytest.mark.parametrize("cp", SIZES)
def test_every_pair_meets_once_and_ranks_work_alike(cp: int) -> None:
    length = 2 * cp * 3
    positions = [local_positions(length, group(rank, cp)) for rank in range(cp)]
    causal = sorted((i, j) for i in range(length) for j in range(i + 1))
    everything = torch.arange(length)
    for rank_pairs in (
        [
            [pairs(ring_block(r, s, length // cp), positions[r], positions[s]) for s in range(cp)]
            for r in range(cp)
        ],
        [
            [
                pairs(block, positions[r], everything)
                for block in chain.from_iterable(gather_blocks(r, cp, length // cp))
            ]
            for r in range(cp)
        ],
    ):
        flat = [list(chain.from_iterable(blocks)) for blocks in rank_pairs]
        assert sorted(chain.from_iterable(flat)) == causal
        assert len({len(rank) for rank in flat}) == 1


@pytest.mark.parametrize("chunks", [MathChunks(), CpuFlashChunks()], ids=["math", "flash"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("cp", [2, 5])
def test_merged_chunks_equal_whole_sequences(
    chunks: ChunkKernel, heads: tuple[int, int], cp: int
) -> None:
    case = make_case(heads, 2 * cp * 7)
    for simulated in (ring, gathered):
        output, *gradients = errors(simulated(case, cp, chunks), whole(case))
        assert output <= 1e-6 and max(gradients) <= 1e-5


@pytest.mark.parametrize("documents", [False, True])
def test_the_arithmetic_is_exact(documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64 nothing is left but rounding; also when scores are computed tile by tile."""
    case = make_case((6, 2), 48, documents=documents, dtype=torch.float64)
    for tile in (context_chunks.SCORES, 500, 1):
        monkeypatch.setattr(context_chunks, "SCORES", tile)
        assert max(errors(ring(case, 4, MathChunks()), whole(case))) < 1e-14


def test_large_scores_do_not_overflow() -> None:
    case = make_case((2, 2), 32)
    case.q *= 300.0
    # Scores reach 2000, where fp32 steps by 1.2e-4; a weight is as wrong as its score.
    for chunks in (MathChunks(), CpuFlashChunks()):
        assert max(errors(ring(case, 2, chunks), whole(case))) < 1e-3


def test_a_query_without_keys_counts_nothing() -> None:
    """A document that ends before the queries': the block is empty, in any order of merging."""
    q, k, v, _ = (x[:, :, :4] for x in vars(make_case((2, 2), 8)).values() if x is not None)
    kernel, own = MathChunks(), torch.zeros(2, 4, dtype=torch.int64)
    out, lse = kernel.forward(q, k, v, False, (own, own + 1))
    assert out.eq(0).all() and lse.eq(-torch.inf).all()
    full = kernel.forward(q, k, v, True, (own, own))
    empty = (out.clone(), lse.clone())
    for results in ([full, empty], [empty, full], [empty, empty, full]):
        merge = Merge(*(x.clone() for x in results[0]))
        for each in results[1:]:
            merge.add(slice(None), *each)
        assert torch.equal(merge.out_BHQD, full[0]) and torch.equal(merge.lse_BHQ, full[1])
    grads = kernel.backward(q, q, k, v, full[0], full[1], False, (own, own + 1))
    assert all(grad.eq(0).all() for grad in grads)


def test_the_choice_on_the_cpu() -> None:
    x = torch.zeros(1, 1, 2, 8)
    assert isinstance(chunk_kernel(x, x, x, documents=False), CpuFlashChunks)
    assert isinstance(chunk_kernel(x, x, x, documents=True), MathChunks)
    assert isinstance(chunk_kernel(x.double(), x, x, documents=False), MathChunks)
    pair = (torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="packed documents"):
        CpuFlashChunks().forward(x, x, x, True, pair)
    with pytest.raises(ValueError, match="packed documents"):
        CpuFlashChunks().backward(x, x, x, x, x, x[..., 0], True, pair)


def test_a_back_end_that_was_asked_for_computes_the_blocks() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for backend, kind in (("flash", FlashChunks), ("cudnn", CudnnChunks), ("math", MathChunks)):
        assert isinstance(named_chunks(backend, cuda), kind)
    assert isinstance(named_chunks("math", cpu), MathChunks)
    for backend, device in (("auto", cuda), ("sdpa", cuda), ("flash", cpu), ("auto", cpu)):
        assert named_chunks(backend, device) is None


def test_cut_of_one_rank_is_the_whole() -> None:
    x = torch.arange(6)[None]
    assert cut(x, group(0, 1)) is x
