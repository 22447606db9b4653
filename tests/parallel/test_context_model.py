"""A whole model under context parallelism; dropout, compilation, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mtk.data.loader import MicroBatch
from mtk.data.packing import Packing
from mtk.models.gpt import GPT
from mtk.parallel import collectives
from mtk.parallel.context import context_kernel
from mtk.parallel.groups import Group
from mtk.parallel.ranks import Ranks
from mtk.training.batch import LocalBatch
from mtk.training.feed import Feed
from mtk.training.loss import token_losses
from tests.models.sizes import llama_config, small_config, small_model
from tests.parallel.attention_cases import make_case
from tests.parallel.ranks import run_ranks
from tests.parallel.test_context import METHODS, context_group

MODELS = {"learned": small_config, "rope": llama_config}


def micro_batch(packing: Packing) -> MicroBatch:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(85, 97, (2, 25), generator=generator)
    mask = (torch.rand(2, 24, generator=generator) > 0.3).float()
    tokens = text[:, :-1]
    documents, positions = packing.documents(tokens), packing.position_ids(tokens)
    return MicroBatch(tokens, text[:, 1:], mask, (0, 1), documents, positions)


def local_part(micro: MicroBatch, cp: Group) -> LocalBatch:
    return Feed(Ranks(cp=cp))(micro)


def whole(micro: MicroBatch) -> LocalBatch:
    return local_part(micro, Group("cp"))


def gradients(model: GPT, micro: LocalBatch, valid: Tensor, cp: Group) -> dict[str, Tensor]:
    """Loss and gradients, summed over the ranks."""
    logits = model(micro.tokens_BS, micro.positions, documents=micro.documents_BS)
    loss = (token_losses(logits, micro.labels_BS) * micro.loss_mask_BS).sum() / valid
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    parts = {"loss": loss.detach(), **found}
    return {name: collectives.all_reduce(x, cp, "test") for name, x in parts.items()}


def _model(rank: int, method: str, cp: int) -> None:
    group = context_group(rank, cp)
    for make in MODELS.values():
        for packing in (Packing(90, False, False), Packing(90, True, True)):
            micro = micro_batch(packing)
            valid = micro.loss_mask_BS.sum()
            alone = gradients(small_model(make()), whole(micro), valid, Group("one"))
            shared = small_model(make(), kernel=context_kernel(method, group))
            together = gradients(shared, local_part(micro, group), valid, group)
            assert alone.keys() == together.keys()
            for name, exact in alone.items():
                torch.testing.assert_close(together[name], exact, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_on_ranks_equals_one_process(method: str) -> None:
    run_ranks(2, _model, method, 2)


def test_a_local_batch_has_global_positions() -> None:
    micro = micro_batch(Packing(90, False, False))
    group = Group("cp", (0, 1), 1)
    part = local_part(micro, group)
    assert part.documents_BS is None
    assert part.positions is not None and part.positions.tolist() == [*range(6, 18)]
    assert torch.equal(part.labels_BS, micro.labels_BS[:, 6:18])
    assert whole(micro).positions is None


def _dropout(rank: int, method: str) -> None:
    """Attention to equal keys with value 1: each output is the share of keys kept, times 2."""
    group = context_group(rank, 2)
    kernel = context_kernel(method, group)
    torch.manual_seed(rank)
    q = torch.zeros(1, 4, 20, 8, requires_grad=True)
    ones = torch.ones(1, 4, 20, 8)
    draws = []
    for documents in (None, torch.zeros(1, 20, dtype=torch.int64)):
        outs = torch.stack(
            [kernel(q, q, ones, mask=None, dropout=0.5, documents=documents) for _ in range(100)]
        ).detach()
        draws.append(outs)
        assert outs.std() > 0.1
        assert outs.mean() == pytest.approx(1.0, abs=0.03)
    exact = kernel(q, q, ones, mask=None, dropout=0.0)
    torch.testing.assert_close(exact, torch.ones_like(exact))


@pytest.mark.parametrize("method", ["all_gather", "a2a"])
def test_dropout_keeps_the_mean(method: str) -> None:
    run_ranks(2, _dropout, method)


def _compiled(rank: int, method: str, backend: str) -> None:
    group = context_group(rank, 2)
    packing = Packing(90, True, True)
    micro = micro_batch(packing)
    valid = micro.loss_mask_BS.sum()
    alone = gradients(small_model(llama_config()), whole(micro), valid, Group("one"))
    model = small_model(llama_config(), kernel=context_kernel(method, group))
    for block in model.layers.values():
        block.compile(backend=backend, dynamic=False)
    together = gradients(model, local_part(micro, group), valid, group)
    for name, exact in alone.items():
        torch.testing.assert_close(together[name], exact, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_inside_compiled_blocks(method: str) -> None:
    run_ranks(2, _compiled, method, "aot_eager")


@pytest.mark.parametrize("method", METHODS)
def test_refusals(method: str) -> None:
    kernel = context_kernel(method, Group("cp", (0, 1, 2), 0))
    case = make_case((4, 2), 12)
    call: dict[str, Any] = {"mask": None, "dropout": 0.0}
    with pytest.raises(ValueError, match="mask"):
        kernel(case.q, case.k, case.v, **{**call, "mask": torch.ones(1, dtype=torch.bool)})
    if method == "p2p":
        with pytest.raises(ValueError, match="dropout"):
            kernel(case.q, case.k, case.v, **{**call, "dropout": 0.1})
    if method == "a2a":
        with pytest.raises(ValueError, match=r"4 heads over 3 ranks.*p2p or all_gather"):
            kernel(case.q, case.k, case.v, **call)


def test_one_rank_needs_no_context() -> None:
    def inner(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError

    assert context_kernel("p2p", Group("cp"), inner) is inner
    with pytest.raises(KeyError):
        context_kernel("mail", Group("cp", (0, 1), 0))
