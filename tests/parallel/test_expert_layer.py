"""One MoE layer over ranks: sequences cut by context parallelism, ranks without tokens,
compilation.

Shape suffixes: as in ``mtk.models.moe``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mtk.models.gpt import GPT
from mtk.models.moe import MoE
from mtk.parallel import collectives, expert
from mtk.parallel.dims import Dims
from mtk.parallel.expert import ExchangeDispatcher, shard_experts
from mtk.parallel.pieces import Piece
from mtk.parallel.ranks import make_ranks
from tests.models.sizes import llama_config, small_model
from tests.parallel.ranks import run_ranks

CPU = torch.device("cpu")


def single_layer(capacity: float | None = None) -> tuple[GPT, MoE]:
    config = llama_config(
        num_experts=8,
        moe_ffn_hidden_size=32,
        num_layers=1,
        moe_expert_capacity_factor=capacity,
        moe_aux_loss_coeff=0.5,
        moe_z_loss_coeff=0.05,
        seq_length=16,
    )
    model = small_model(config).train()
    layer = model.layers["0"].mlp
    assert isinstance(layer, MoE)
    with torch.no_grad():
        layer.router.weight.mul_(20)
        for weight in layer.experts.parameters():
            weight.mul_(5)
    return model, layer


def run_layer(model: GPT, layer: MoE, x_BSE: Tensor, out_weight: Tensor) -> dict[str, Tensor]:
    assert model.balance is not None
    model.balance.begin(CPU, samples=4, tokens=64, loss_scale=1.0)
    x_BSE = x_BSE.clone().requires_grad_()
    out = layer(x_BSE)
    (out * out_weight).sum().backward()
    gradients = {f"grad.{n}": p.grad for n, p in layer.named_parameters() if p.grad is not None}
    assert x_BSE.grad is not None
    return {
        "out": out.detach(),
        "x": x_BSE.grad,
        "balance": model.balance.means(),
        **gradients,
    }


def layer_inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(4, 16, 32, generator=generator),
        torch.randn(4, 16, 32, generator=generator),
    )


def head_and_tail(x_BSE: Tensor, rank: int, size: int) -> Tensor:
    chunks = x_BSE.chunk(2 * size, dim=1)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim=1)


def context_layer(
    rank: int, cp: int, ep: int, capacity: float | None, fault: str | None
) -> list[tuple[str, Any]]:
    """A layer whose sequences are cut over cp; gradients already summed over ranks."""
    if fault == "loads of own chunks only":
        own = lambda x, group, site: x.repeat(group.size, 1, 1)  # noqa: E731
        setattr(expert, "all_gather", own)  # noqa: B010
    if fault == "chunks in the order of ranks":
        setattr(Tensor, "flip", lambda self, *dims: self)  # noqa: B010
    ranks = make_ranks(Dims(cp=cp, ep=ep), rank=rank, device=CPU)
    model, layer = single_layer(capacity)
    copies = (ranks.shards,)
    pieces = {n: Piece.whole(tuple(p.shape), copies) for n, p in model.named_parameters()}
    shard_experts(model, ranks, False, pieces)
    x_BSE, out_weight = (head_and_tail(t, rank, cp) for t in layer_inputs())
    found = run_layer(model, layer, x_BSE, out_weight)
    for name in found:
        if name.startswith("grad.") or name == "balance":
            group = ranks.expert_shards if "experts" in name else ranks.shards
            found[name] = collectives.all_reduce(found[name], group, "test")
    return [(name, tensor.numpy()) for name, tensor in found.items()]


def context_errors(cp: int, ep: int, capacity: float | None, fault: str | None = None) -> list[str]:
    model, layer = single_layer(capacity)
    one = run_layer(model, layer, *layer_inputs())
    results = run_ranks(cp, context_layer, cp, ep, capacity, fault)
    wrong = []
    for rank, result in enumerate(results):
        for name, array in result:
            theirs = torch.from_numpy(array)
            ours = one[name]
            if name in ("out", "x"):
                ours = head_and_tail(ours, rank, cp)
            elif "experts" in name:
                ours = ours.chunk(ep)[rank % ep]
            error = (ours - theirs).abs().max().item() / one[name].abs().max().item()
            if error > 1e-6:
                wrong.append(f"{name} on rank {rank}: {error:.1e}")
    return wrong


@pytest.mark.parametrize("capacity", [None, 0.75])
@pytest.mark.parametrize(("cp", "ep"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_sequences_cut_over_ranks(cp: int, ep: int, capacity: float | None) -> None:
    assert context_errors(cp, ep, capacity) == []


@pytest.mark.parametrize("fault", ["loads of own chunks only", "chunks in the order of ranks"])
def test_faults_of_cut_sequences_are_caught(fault: str) -> None:
    assert context_errors(4, 2, 0.75, fault) != []


def _send(rank: int, chosen: list[list[int]]) -> list[float]:
    """Every expert adds its number to a row; returns this rank's rows, and checks gradients."""
    ranks = make_ranks(Dims(dp=len(chosen), ep=len(chosen)), rank=rank, device=CPU)
    dispatcher = ExchangeDispatcher(ranks.ep)
    experts = 2 * len(chosen)
    mine = torch.tensor(sorted(chosen[rank]), dtype=torch.int64)
    counts_X = torch.bincount(mine[mine < experts], minlength=experts)
    x_ME = (100.0 * rank + torch.arange(len(mine))[:, None]).requires_grad_()
    x_RE, arrival = dispatcher.dispatch(x_ME, counts_X)
    sizes = arrival.ends_X.diff(prepend=torch.zeros(1, dtype=torch.int32))
    assert sizes.sum() == len(x_RE)
    numbers = torch.arange(2 * rank, 2 * rank + 2).repeat_interleave(sizes)[:, None]
    out_ME = dispatcher.combine(x_RE + 0.01 * numbers, arrival)
    (out_ME * 3.0).sum().backward()
    assert x_ME.grad is not None
    assert torch.equal(x_ME.grad[:, 0], 3.0 * (mine < experts))
    got = (out_ME - x_ME).flatten()[mine < experts]
    torch.testing.assert_close(got, 0.01 * mine[mine < experts], rtol=0, atol=1e-4)
    assert not out_ME[len(got) :].any()
    return [float(value) for value in out_ME.flatten()]


@pytest.mark.parametrize(
    "chosen",
    [
        [[0, 3, 1], [2, 2, 0]],
        [[0, 1, 1], [0, 0]],  # the second rank receives none
        [[], [3, 0]],  # the first has none
        [[], []],
        [[4, 0, 4], [4]],  # 4 is dropped
        [[0, 3, 7, 7], [], [8, 8], [1, 2, 5, 6, 4]],
    ],
    ids=str,
)
def test_dispatch_with_none_on_some_ranks(chosen: list[list[int]]) -> None:
    results = run_ranks(len(chosen), _send, chosen)
    assert [len(rows) for rows in results] == [len(rows) for rows in chosen]


def _all_to_one(rank: int) -> None:
    """A layer whose tokens all go to the experts of one rank."""
    ranks = make_ranks(Dims(dp=2, ep=2), rank=rank, device=CPU)
    model, layer = single_layer()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:2, 0] = 1.0
    pieces = {n: Piece.whole(tuple(p.shape)) for n, p in model.named_parameters()}
    x_BSE, _ = layer_inputs()
    x_BSE[..., 0] = 3.0
    expected = layer(x_BSE).detach()
    shard_experts(model, ranks, False, pieces)
    out = layer(x_BSE)
    torch.testing.assert_close(out.detach(), expected, rtol=1e-5, atol=1e-6)
    out.sum().backward()
    gradient = layer.experts.up.grad
    assert gradient is not None and gradient.shape[0] == 4
    assert bool(gradient.any()) == (rank == 0)


def test_experts_without_tokens_have_gradients_of_zero() -> None:
    run_ranks(2, _all_to_one)


def _compiled(rank: int) -> None:
    ranks = make_ranks(Dims(dp=2, ep=2), rank=rank, device=CPU)
    model, _ = single_layer()
    pieces = {n: Piece.whole(tuple(p.shape)) for n, p in model.named_parameters()}
    shard_experts(model, ranks, False, pieces)
    block = model.layers["0"]
    generator = torch.Generator().manual_seed(rank)
    for _ in range(6):
        x_BSE = torch.randn(2, 16, 32, generator=generator)
        plain = block(x_BSE)
        compiled = torch.compile(block, backend="eager", dynamic=False)(x_BSE)
        torch._dynamo.config.error_on_recompile = True
        assert torch.equal(plain, compiled)
        compiled.sum().backward()


def test_compiled_blocks_are_compiled_once() -> None:
    """The number of rows that arrive changes with each batch and must not matter."""
    run_ranks(2, _compiled)


def test_pieces_of_experts() -> None:
    class Shares:
        tp = collectives.Group("tp", (0, 1), 1)
        ep = collectives.Group("ep", (0, 2), 1)
        shards = collectives.Group("shards", (0, 2, 4, 6), 1)
        expert_shards = collectives.Group("expert_shards", (0, 4), 0)

    whole = Piece.whole((8, 32, 16), (Shares.tp, Shares.shards)).with_partial(Shares.tp)
    piece = expert.expert_piece(whole, 1, Shares())  # type: ignore[arg-type]
    assert (piece.offset, piece.size) == ((4, 16, 0), (4, 16, 16))
    assert [group.name for group in piece.copies] == ["expert_shards"] and piece.partial == ()
