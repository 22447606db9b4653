"""Pipelines of other modules: several tensors between stages, recomputation, collectives in
the layers; seeded faults are caught; wrong use is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtk.parallel import collectives
from mtk.parallel.deferred import defer_weight_gradients
from mtk.parallel.dims import Dims
from mtk.parallel.groups import Group
from mtk.parallel.messages import Spec
from mtk.parallel.pipeline import Pipeline, states_boundary
from mtk.parallel.ranks import make_ranks
from mtk.parallel.schedules import Message
from mtk.parallel.stages import TIED, placement
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

WIDTH = 6
SCHEDULES = [("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1), ("zero-bubble", 2), ("zbv", 2)]


class TwoStreams(nn.Module):
    """As a decoder that reads what an encoder wrote: takes and returns two tensors, and a
    third that has no gradient."""

    def __init__(self, index: int, last: bool) -> None:
        super().__init__()
        torch.manual_seed(index)
        self.last = last
        self.encoder, self.decoder = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, memory: Tensor, x: Tensor, ids: Tensor) -> Any:
        # Odd stages pass the memory on as it is, as a decoder does.
        memory = self.encoder(memory).tanh() if not self.last else memory
        x = x + self.decoder(x + memory).tanh()
        return x if self.last else (memory, x, ids + 1)


@dataclass(frozen=True)
class Streams:
    memory: Tensor
    x: Tensor
    ids: Tensor


def _streams(module: nn.Module, received: tuple[Tensor, ...], batch: Streams) -> Any:
    return module(*(received or (batch.memory, batch.x, batch.ids)))


def _streams_boundary(stage: int, batch: Streams) -> tuple[Spec, ...]:
    del stage
    return tuple(Spec(tuple(t.shape), t.dtype) for t in (batch.memory, batch.x, batch.ids))


def _two_streams(rank: int) -> None:
    group = make_ranks(Dims(pp=2), rank=rank, device=CPU).pp
    random = torch.Generator().manual_seed(5)
    batches = [
        Streams(
            torch.randn(size, WIDTH, generator=random),
            torch.randn(size, WIDTH, generator=random),
            torch.zeros(size, dtype=torch.int64),
        )
        for size in (3, 2, 5)  # shapes may change from one micro-batch to the next
    ]
    for schedule, virtual in SCHEDULES:
        where = placement(2, 2 * virtual, v_shape=schedule == "zbv")
        own = [s for s, place in enumerate(where) if place == rank]
        whole = [TwoStreams(s, s == len(where) - 1) for s in range(len(where))]
        for batch in batches:
            out: Any = (batch.memory, batch.x, batch.ids)
            for module in whole:
                out = module(*out)
            out.square().sum().backward()
        mine = [TwoStreams(s, s == len(where) - 1) for s in own]
        deferred = [defer_weight_gradients(m) for m in mine]
        pipeline = Pipeline(
            mine,
            where,
            group,
            schedule,
            _streams_boundary,
            device=CPU,
            deferred=deferred,
            call=_streams,
        )
        pipeline.run(batches, lambda x, index: x.square().sum())
        for stage, module in zip(own, mine, strict=True):
            wanted = dict(whole[stage].named_parameters())
            for name, parameter in module.named_parameters():
                if module.last and name.startswith("encoder"):
                    assert parameter.grad is None
                    continue
                torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-5, atol=1e-6)


def test_several_tensors_between_stages() -> None:
    run_ranks(2, _two_streams)


class Split(nn.Module):
    """A tensor-parallel block: half of the columns, then half of the rows, on each rank."""

    def __init__(self, index: int, group: Group | None, *, recompute: bool) -> None:
        super().__init__()
        torch.manual_seed(index)
        self.group, self.recompute, self.runs = group, recompute, 0
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8, bias=False)
        self.down = nn.Linear(8, WIDTH, bias=False)
        if group is not None:
            rows = slice(4 * group.rank, 4 * group.rank + 4)
            self.up.weight = nn.Parameter(self.up.weight[rows].detach().clone())
            self.down.weight = nn.Parameter(self.down.weight[:, rows].detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute:
            out: Tensor = checkpoint(self.block, x, use_reentrant=False)
            return out
        return self.block(x)

    def block(self, x: Tensor) -> Tensor:
        self.runs += 1
        x_in = self.norm(x)
        if self.group is None:
            return x + self.down(self.up(x_in).tanh())
        x_in = collectives.copy_to_parts(x_in, self.group, "test.copy")
        part = self.down(self.up(x_in).tanh())
        return x + collectives.sum_of_parts(part, self.group, "test.sum")


def _collectives(rank: int) -> None:
    ranks = make_ranks(Dims(pp=2, tp=2), rank=rank, device=CPU)
    random = torch.Generator().manual_seed(5)
    batches = [torch.randn(3, WIDTH, generator=random) for _ in range(3)]
    for schedule, virtual in SCHEDULES:
        for recompute in (False, True):
            where = placement(2, 2 * virtual, v_shape=schedule == "zbv")
            own = [s for s, place in enumerate(where) if place == ranks.pp.rank]
            whole = [Split(s, None, recompute=False) for s in range(len(where))]
            for x in batches:
                for module in whole:
                    x = module(x)
                x.square().sum().backward()
            mine = [Split(s, ranks.tp, recompute=recompute) for s in own]
            pipeline = Pipeline(
                mine,
                where,
                ranks.pp,
                schedule,
                lambda stage, x: (Spec(tuple(x.shape), x.dtype),),
                device=CPU,
                deferred=[defer_weight_gradients(m) for m in mine],
                call=lambda module, received, x: module(received[0] if received else x),
            )
            pipeline.run(batches, lambda x, index: x.square().sum())
            rows = slice(4 * ranks.tp.rank, 4 * ranks.tp.rank + 4)
            for stage, module in zip(own, mine, strict=True):
                # Once forward and, when recomputed, once in backward: not per weight.
                assert module.runs == len(batches) * (2 if recompute else 1)
                wanted = whole[stage]
                for found, want in (
                    (module.up.weight.grad, wanted.up.weight.grad[rows]),
                    (module.down.weight.grad, wanted.down.weight.grad[:, rows]),
                    (module.norm.weight.grad, wanted.norm.weight.grad),
                    (module.norm.bias.grad, wanted.norm.bias.grad),
                ):
                    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def test_collectives_and_recomputation_inside_stages() -> None:
    run_ranks(4, _collectives)


def _faulty(rank: int) -> dict[str, bool]:
    """Whether each seeded fault was seen on any rank's comparison."""
    ranks = make_ranks(Dims(pp=2), rank=rank, device=CPU)
    caught = {}
    faults: dict[str, Callable[[Pipeline], None]] = {
        "none": lambda pipeline: None,
        "no tied sum": lambda pipeline: None,
        "labels of another micro-batch": lambda pipeline: None,
        "weight gradients forgotten": _forget_weights,
        "states of another micro-batch": _cross("forward"),
        "gradients of another micro-batch": _cross("backward"),
    }
    for name, fault in faults.items():
        case = Case("zero-bubble", (3, 2), 4, tied=True)
        batches = make_batches(case.count)
        total, model = one_process(case.config, batches)
        pipeline = make_pipeline(case, ranks)
        fault(pipeline)
        shifted = [*batches[1:], batches[0]] if name.startswith("labels") else batches
        loss = pipeline.run(batches, loss_over(shifted))
        if name != "no tied sum":
            sum_tied(case, pipeline, ranks)
        caught[name] = bool(worst(pipeline, ranks, total, loss, model))
    return caught


def _forget_weights(pipeline: Pipeline) -> None:
    """Those of the first micro-batch."""
    for deferred in pipeline.deferred.values():
        finish = deferred.finish
        deferred.finish = lambda micro, do=finish: do(micro) if micro else None  # type: ignore


def _cross(kind: str) -> Callable[[Pipeline], None]:
    """A fault: the first two receives of ``kind`` on the other rank change places."""

    def fault(pipeline: Pipeline) -> None:
        if pipeline.has_loss == (kind == "backward"):
            return
        program = pipeline._program(4, training=True)
        posts = [s for s in program if isinstance(s, Message) and not s.sent and s.kind == kind]
        first = program.index(posts[0])
        for step in posts:
            program.remove(step)
        # All are posted early, so that only the order differs.
        program[first:first] = [posts[1], posts[0], *posts[2:]]

    return fault


def test_faults_are_caught() -> None:
    results = run_ranks(2, _faulty)
    seen = {name: any(result[name] for result in results) for name in results[0]}
    assert seen == {name: name != "none" for name in seen}


def _wrong_use(rank: int) -> None:
    group = make_ranks(Dims(pp=1), rank=rank, device=CPU).pp
    boundary = states_boundary(WIDTH, torch.float32)
    linear = nn.Linear(WIDTH, WIDTH)

    def pipeline(schedule: str, stages: int, modules: int = 2) -> Pipeline:
        return Pipeline(
            [linear] * modules,
            (0,) * stages,
            group,
            schedule,
            lambda stage, x: (Spec((1, WIDTH), torch.float32),),
            device=CPU,
            call=lambda module, received, x: module(x),
        )

    with pytest.raises(ValueError, match="2 modules for the stages"):
        pipeline("interleaved", 3)
    with pytest.raises(ValueError, match="needs defer_weight_gradients"):
        pipeline("zbv", 2)
    with pytest.raises(ValueError, match="at least one micro-batch"):
        pipeline("interleaved", 2).run([], lambda x, index: x.sum())
    with pytest.raises(ValueError, match=r"stage 0 returned .*\(2, 6\).*takes .*\(1, 6\)"):
        pipeline("interleaved", 2).run([torch.zeros(2, WIDTH)], lambda x, index: x.sum())
    assert boundary(1, make_batches(1)[0]) == (Spec((2, 8, WIDTH), torch.float32),)
    halves = states_boundary(WIDTH, torch.bfloat16, sequence_ranks=2)
    assert halves(1, make_batches(1)[0]) == (Spec((8, WIDTH), torch.bfloat16),)
    assert TIED == "embedding.tokens.weight"


def test_wrong_use_is_refused() -> None:
    _wrong_use(0)
