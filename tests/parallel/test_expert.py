"""Expert parallelism against one process, from a single layer to a training step; and seeded
faults, all of which the comparison must catch.

Shape suffixes: as in ``mtk.models.moe``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mtk.config.pretrain import PretrainConfig
from mtk.models.balance import BalanceLosses
from mtk.models.experts import permute
from mtk.models.gpt import GPT
from mtk.models.moe import MoE
from mtk.parallel import collectives, expert, tensor
from mtk.parallel.dims import Dims
from mtk.parallel.expert import ExchangeDispatcher, SharedRegion, shard_experts
from mtk.parallel.pieces import Piece
from mtk.parallel.ranks import Ranks, make_ranks
from mtk.verification.compare import Tolerance, compare
from mtk.verification.observe import Observation
from tests.models.sizes import llama_config, small_model
from tests.parallel.layouts import configure, one_process, step_on_rank
from tests.parallel.ranks import run_ranks

CPU = torch.device("cpu")
TP, EP, SP = "tensor_model_parallel_size", "expert_model_parallel_size", "sequence_parallel"
SHARDING = "data_parallel_sharding"


def moe_run(world: int, changes: Mapping[str, Any] | None = None, **layout: Any) -> PretrainConfig:
    """A tiny MoE run; losses weigh enough to be seen in the gradients."""
    values = {
        "num_experts": 8,
        "num_layers": 2,
        "moe_ffn_hidden_size": 32,
        "moe_layer_freq": 2,
        "moe_aux_loss_coeff": 0.3,
        "moe_z_loss_coeff": 0.03,
        **(changes or {}),
    }
    # Adam divides by each gradient's own size: above this eps rounding is not blown up.
    own = {f"model.{name}": value for name, value in values.items()} | {"optimizer.adam_eps": 1e-4}
    return configure("llama", world, own, **layout)


def errors(config: PretrainConfig, world: int, fault: str | None = None) -> list[str]:
    """What differs from one process; ranks that fail or disagree count too."""
    single = dataclasses.replace(config, parallel=type(config.parallel)())
    one = one_process(single, 1)
    try:
        ranks = run_ranks(world, faulty_step, config, world, fault)
        found = compare(one, ranks, Tolerance()).failures
    except (AssertionError, ValueError) as error:
        if fault is None:
            raise
        return [str(error)]
    for rank in ranks:
        if rank.balance != pytest.approx(one.balance, rel=1e-6):
            found.append(f"balancing losses {rank.balance}, in one process {one.balance}")
    assert min(one.balance) > 0.1
    return found


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {TP: 2}),
    (2, {TP: 2, SP: True}),
    (2, {EP: 2}),
    (4, {EP: 4, SHARDING: "optimizer"}),
    (4, {EP: 2}),
    (4, {EP: 2, TP: 2}),
    (4, {EP: 2, TP: 2, SP: True}),
    (4, {EP: 2, SHARDING: "full"}),
]


@pytest.mark.parametrize("capacity", [None, 0.75])
@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=str)
def test_a_step_equals_one_process(
    world: int, layout: dict[str, Any], capacity: float | None
) -> None:
    config = moe_run(world, {"moe_expert_capacity_factor": capacity}, **layout)
    assert errors(config, world) == []


# -- seeded faults ----------------------------------------------------------------------


def _set(target: Any, name: str, value: Any) -> None:
    setattr(target, name, value)


def _without_site(site: str, otherwise: Callable[[Tensor], Tensor]) -> None:
    """Leave one call site's collective out."""
    for name in ("copy_to_parts", "sum_of_parts", "gather_rows", "scatter_sum_of_parts"):
        original = getattr(expert, name)

        def replaced(x: Tensor, group: Any, at: str, original: Any = original) -> Tensor:
            return otherwise(x) if at == site else original(x, group, at)

        _set(expert, name, replaced)


def _exchange(site: str, change: Callable[[Tensor], Tensor]) -> None:
    original = expert.exchange_rows

    def replaced(x: Tensor, receive: Any, send: Any, group: Any, at: str) -> Tensor:
        out = original(x, receive, send, group, at)
        return change(out) if at == site else out

    _set(expert, "exchange_rows", replaced)


def _begin(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    original = BalanceLosses.begin

    def begin(self: BalanceLosses, device: torch.device, **given: Any) -> None:
        original(self, device, **change(given))

    _set(BalanceLosses, "begin", begin)


def _not_sent_back() -> None:
    def combine(self: ExchangeDispatcher, out_RE: Tensor, arrival: Any) -> Tensor:
        rows = out_RE[: arrival.given]
        return torch.nn.functional.pad(rows, (0, 0, 0, arrival.given - rows.shape[0]))

    _set(ExchangeDispatcher, "combine", combine)


def _order_of_arrival() -> None:
    def kept(x_ME: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
        return permute(x_ME, order_M.sort().values, inverse_M.sort().values)

    _set(expert, "permute", kept)


def _own_tokens_chosen() -> None:
    def chosen(self: SharedRegion, chosen_NK: Tensor) -> Tensor:
        return chosen_NK.repeat(self.tp.size if self.sequence else 1, 1)

    _set(SharedRegion, "chosen", chosen)


def _all_reduce_twice(site: str) -> None:
    original = collectives.all_reduce

    def twice(x: Tensor, group: Any, at: str, op: str = "sum") -> Tensor:
        out = original(x, group, at, op)
        return original(out, group, at, op) if at == site else out

    _set(collectives, "all_reduce", twice)


def _router_whole() -> None:
    _set(expert, "_of_rows", lambda piece, tp: piece)
    _set(tensor, "_sum_gradients_of_rows", _all_but_routers)


_sum_of_rows = tensor._sum_gradients_of_rows


def _all_but_routers(model: GPT, tp: Any, pieces: dict[str, Piece]) -> None:
    before = {name: piece for name, piece in pieces.items() if "router" in name}
    _sum_of_rows(model, tp, pieces)
    pieces.update(before)


def _experts_summed_over_all() -> None:
    original = expert.expert_piece

    def piece(whole: Piece, dim: int, ranks: Ranks) -> Piece:
        return original(whole, dim, ranks).with_partial(ranks.ep)

    _set(expert, "expert_piece", piece)


def _same_holders() -> None:
    original = expert.shard_experts

    def shard(model: GPT, *rest: Any) -> None:
        original(model, *rest)
        assert model.balance is not None
        model.balance.holders = 1

    from mtk.parallel import apply

    _set(apply, "shard_experts", shard)


DENSE_TP, WITH_SP = {TP: 2, EP: 2}, {TP: 2, EP: 2, SP: True}
FAULTS: dict[str, tuple[dict[str, Any], Callable[[], None]]] = {
    "outputs not sent back": ({EP: 2}, _not_sent_back),
    "outputs sent back twice over": ({EP: 2}, lambda: _exchange("ep.combine", lambda x: 2 * x)),
    "outputs in the wrong order": ({EP: 2}, lambda: _exchange("ep.combine", lambda x: x.flip(0))),
    "tokens in the wrong order": (
        {EP: 2},
        lambda: _exchange("ep.dispatch", lambda x: x.roll(1, 0)),
    ),
    "experts get tokens by rank": ({EP: 2}, _order_of_arrival),
    "aux loss scaled by ep": (
        {EP: 2},
        lambda: _begin(lambda g: g | {"samples": g["samples"] // 2}),
    ),
    "z-loss per rank": ({EP: 2}, lambda: _begin(lambda g: g | {"tokens": g["tokens"] // 2})),
    "loss scale forgotten": ({EP: 2}, lambda: _begin(lambda g: g | {"loss_scale": 2.0})),
    "expert gradients over ep": ({EP: 2}, _experts_summed_over_all),
    "outputs of parts not summed": (
        DENSE_TP,
        lambda: _without_site("moe.output", lambda x: x),
    ),
    "token gradients of parts not summed": (
        DENSE_TP,
        lambda: _without_site("moe.tokens", lambda x: x),
    ),
    "weight gradients of parts not summed": (
        DENSE_TP,
        lambda: _without_site("moe.weights", lambda x: x),
    ),
    "token gradients summed twice": (DENSE_TP, lambda: _all_reduce_twice("moe.tokens")),
    "balance counted by each part": (DENSE_TP, _same_holders),
    "weights of own rows only": (
        WITH_SP,
        lambda: _without_site("moe.weights", lambda x: x.repeat(2, 1)),
    ),
    "choices of own rows only": (WITH_SP, _own_tokens_chosen),
    "router gradient of own rows only": (WITH_SP, _router_whole),
}


def faulty_step(rank: int, config: PretrainConfig, world: int, fault: str | None) -> Observation:
    if fault is not None:
        FAULTS[fault][1]()
    return step_on_rank(rank, config, world)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault: str) -> None:
    layout = FAULTS[fault][0]
    world = layout[EP] * layout.get(TP, 1)
    assert errors(moe_run(world, {"moe_layer_freq": 1}, **layout), world, fault) != []


# -- one layer --------------------------------------------------------------------------


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
        _set(expert, "all_gather", own)
    if fault == "chunks in the order of ranks":
        _set(Tensor, "flip", lambda self, *dims: self)
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
