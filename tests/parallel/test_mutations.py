"""Every collective of the core, left out or doubled, must show in the comparison with one
process; and no collective goes without such a check.

What a layout calls is found by running it, so a new collective is tried without being listed
here; the sites in the sources are found by reading them, so one that no layout reaches fails.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import mtk
from mtk.config import make
from mtk.config.float8 import Float8Options
from mtk.config.parallel import ParallelConfig
from mtk.config.pretrain import PretrainConfig
from mtk.parallel.dims import Dims
from mtk.parallel.ranks import Ranks, make_ranks
from mtk.parallel.rng import SharedDropout
from mtk.precision.float8 import Scaling
from mtk.precision.float8_casts import PlainCasts
from mtk.precision.float8_history import History
from mtk.training.assemble import make_stepper
from mtk.training.evaluate import held_out_loss
from mtk.verification.compare import compare
from mtk.verification.observe import Observation, observe, random_sample, share
from tests.parallel.layouts import configure, one_process
from tests.parallel.mutants import StandIn, other_fault
from tests.parallel.ranks import run_ranks
from tests.parallel.test_expert import moe_run

TP, PP, CP = (f"{a}_parallel_size" for a in ("tensor_model", "pipeline_model", "context"))
EP, SP = "expert_model_parallel_size", "sequence_parallel"
SCHEDULE, SHARDING = "pipeline_schedule", "data_parallel_sharding"
COPIES, METHOD = "num_distributed_optimizer_instances", "cp_comm_type"
CAPACITY = {"moe_expert_capacity_factor": 0.75, "moe_layer_freq": 1}
DOCUMENTS = {"data.reset_attention_mask": True}
# Several of its samples have text on both ranks.
BERT = {"model.family": "bert", "model.num_query_groups": None, "batch.global_batch_size": 8}
T5 = {"model.family": "t5", "model.num_layers": 1, "model.decoder_seq_length": 8}
# The call, or the name of a fault of ``mutants.OTHER``, and how it goes wrong.
Fault = tuple[str, str]


@dataclass(frozen=True)
class Layout:
    """others: faults besides the collectives it calls. fresh: beginnings of the sites that are
    tried in every way; the rest, which other layouts try, are only left out."""

    world: int
    fields: dict[str, Any]
    others: tuple[str, ...] = ()
    model: str = "gpt2"
    changes: dict[str, Any] = field(default_factory=dict)
    steps: int = 1
    fresh: tuple[str, ...] = ("",)

    @property
    def config(self) -> PretrainConfig:
        if self.model == "moe":
            return moe_run(self.world, self.changes, **self.fields)
        small = {"model.num_layers": 2, "batch.global_batch_size": 4}
        return configure(self.model, self.world, small | self.changes, **self.fields)


ZBV = ("gradient of the tied copy dropped", "gradient of the tied copy doubled")
LAYOUTS: dict[str, Layout] = {
    "tp2": Layout(2, {TP: 2}, ("norm counts every copy",)),
    "tp2.sp": Layout(2, {TP: 2, SP: True}),
    "dp2.optimizer": Layout(2, {SHARDING: "optimizer"}, ("gradients averaged over two",)),
    "pp2.1f1b": Layout(2, {PP: 2}, ("norm counts every copy",)),
    "tp2.chunks": Layout(2, {TP: 2, SP: True}, changes={"runtime.loss_chunk_tokens": 10}),
    "tp4.kv": Layout(4, {TP: 4}, fresh=("grads.", "step.")),
    "dp2.replicate": Layout(2, {}, ("norm counts every copy", "last micro-batch not reduced")),
    "dp4.hybrid": Layout(4, {SHARDING: "full", COPIES: 2}, ("norm counts every copy",)),
    "pp2.zbv": Layout(
        2,
        {PP: 2, SCHEDULE: "zbv"},
        (*ZBV, "tied copy not refreshed", "delayed gradients of a micro-batch lost"),
        changes={"model.num_layers": 4},
        steps=2,
    ),
    "cp2.p2p": Layout(
        2, {CP: 2}, ("valid tokens counted by each context rank",), changes=DOCUMENTS
    ),
    "cp2.all_gather": Layout(2, {CP: 2, METHOD: "all_gather"}),
    "cp2.all_gather.documents": Layout(2, {CP: 2, METHOD: "all_gather"}, changes=DOCUMENTS),
    "cp2.a2a": Layout(2, {CP: 2, METHOD: "a2a"}, changes=DOCUMENTS),
    "ep2": Layout(2, {EP: 2}, model="moe"),
    "ep2-dp4": Layout(4, {EP: 2}, ("gradients averaged over two",), model="moe"),
    "ep2-cp2": Layout(2, {EP: 2, CP: 2}, model="moe", changes=CAPACITY, fresh=("moe.",)),
    "ep2-tp2": Layout(4, {EP: 2, TP: 2}, model="moe", fresh=("moe.",)),
    "ep2-tp2.sp": Layout(
        4, {EP: 2, TP: 2, SP: True}, model="moe", changes=CAPACITY, fresh=("moe.",)
    ),
    "tp2.sp-pp2": Layout(4, {TP: 2, SP: True, PP: 2}, fresh=("grads.", "step.")),
    "dp2.full-pp2": Layout(
        4, {SHARDING: "full", PP: 2, SCHEDULE: "zero-bubble"}, fresh=("grads.", "step.")
    ),
    "cp2-tp2": Layout(4, {CP: 2, TP: 2}, fresh=("step.",)),
    "mamba.tp4": Layout(4, {TP: 4}, model="mamba", fresh=("tp.mamba", "grads.")),
    "mamba.tp4.sp": Layout(4, {TP: 4, SP: True}, model="mamba", fresh=("tp.mamba",)),
    "mamba.cp2": Layout(2, {CP: 2}, model="mamba", changes=DOCUMENTS, fresh=("cp.",)),
    "bert.tp2.sp": Layout(2, {TP: 2, SP: True}, changes=BERT, fresh=("tp.pooler",)),
    "t5.tp2": Layout(2, {TP: 2}, changes=T5, fresh=("tp.memory",)),
    "t5.tp2.sp": Layout(2, {TP: 2, SP: True}, changes=T5, fresh=("tp.memory",)),
}
FAST = ("tp2", "dp2.optimizer", "pp2.1f1b")
# Calls that are made wrong in other ways than by leaving them out and doubling what comes.
WAYS: dict[str, tuple[str, ...]] = {
    # Numbers of rows: any other sum, and ranks would wait for rows that nobody sends.
    "exchange ep.counts": ("of the other experts",),
    # Indices and ids, where twice as much is out of range, or as good a name as any.
    "all_gather moe.chosen": ("left out", "reversed"),
    "all_gather cp.documents": ("left out", "reversed"),
    "pipeline.forward": ("left out", "doubled", "of the micro-batch before"),
    "pipeline.backward": ("left out", "doubled", "of the micro-batch before"),
}
# Faults that change nothing, and why.
EQUAL: dict[Fault, str] = {
    ("all_reduce tp.loss.max", "doubled"): "any shift of all logits cancels in the softmax",
}


def ways(call: str, fresh: tuple[str, ...]) -> tuple[str, ...]:
    once = ("left out once",) if call.startswith("fsdp.") else ()
    found = WAYS.get(call, ("left out", "doubled")) + once
    return found if call.split()[-1].startswith(fresh) else found[:1]


def _played(rank: int, layout: Layout) -> tuple[set[str], dict[Fault | None, Observation]]:
    """What all ranks call in the layout, and what this one sees with every fault (and None)."""
    stand_in = StandIn()
    stand_in.install()
    config, world, steps = layout.config, layout.world, layout.steps
    ranks = make_ranks(
        Dims.of(config.parallel, world),
        rank=rank,
        device=torch.device("cpu"),
        kv_groups=config.model.query_groups,
        state_groups=config.model.state_groups,
        sharded=config.parallel.data_parallel_sharding != "replicate",
    )
    sample = random_sample(config)
    found: dict[Fault | None, Observation] = {None: observe(config, sample, ranks, steps)}
    everywhere: list[set[str]] = [set()] * world
    dist.all_gather_object(everywhere, stand_in.live)
    # What compares copies afterwards is no part of the step.
    live = {call for call in set().union(*everywhere) if " watchdog." not in call}
    for call in sorted(live):
        for how in ways(call, layout.fresh):
            stand_in.begin((call, how))
            found[call, how] = observe(config, sample, ranks, steps)
    stand_in.begin(None)
    for name in layout.others:
        with other_fault(name):
            found[name, ""] = observe(config, sample, ranks, steps)
    return live, found


@cache
def played(name: str) -> tuple[set[str], dict[Fault | None, list[str]]]:
    """What the layout calls, and the failures that the comparison reports for each fault."""
    layout = LAYOUTS[name]
    single = dataclasses.replace(layout.config, parallel=make(ParallelConfig))
    one = one_process(single, layout.steps)
    seen = run_ranks(layout.world, _played, layout)
    faults = seen[0][1]
    return seen[0][0], {f: failures(one, [found[f] for _, found in seen]) for f in faults}


def failures(one: Observation, ranks: list[Observation]) -> list[str]:
    try:
        found = compare(one, ranks).failures
    except ValueError as error:
        return [str(error)]
    if ranks[0].balance != pytest.approx(one.balance, rel=1e-6):
        found.append(f"balancing losses {ranks[0].balance}, in one process {one.balance}")
    return found


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else slow) for n in LAYOUTS]
)
def test_every_fault_is_caught(name: str) -> None:
    _, found = played(name)
    assert found.pop(None) == []
    assert {fault for fault, failed in found.items() if not failed} == set(EQUAL) & set(found)


# -- nothing goes without a check ------------------------------------------------------------

# Sites that no training step reaches: where they are checked, or why they carry no number.
ELSEWHERE = {
    "evaluate.totals": "below",
    "watchdog.agree": "agreement about what watchdog.* found",
    "verify.written": "agreement that a run has ended",
    "evaluate.scores": "scores brought to one rank, compared with one process in test_distributed",
    "evaluate.texts": "texts brought to one rank",
    "evaluate.samples": "classified samples brought together, counted in the tests of finetuning",
    "accuracy.samples": "classified samples of an evaluation, likewise",
    "tp.dropout": "below",
    "float8.*": "below",
    "custom.logits": "logits handed out, compared whole in test_custom",
    "tp.logits": "logits of a server's ranks, whose answers are compared with one process's",
    "run.base": "records of a manifest",
    "run.attention": "the choice of a kernel",
    "moe.sequences": "Sinkhorn's, with the faults of its own tests of routers",
    "moe.rows": "Sinkhorn's, with the faults of its own tests of routers",
    "run.layout": "a line for people",
    "watchdog.*": "hashes of copies, with faults of their own in test_watchdog",
    "step.finite": "agreement about a checkpoint",
    "loop.stop": "agreement to stop",
    "run.start": "agreement where to start",
    "run.locked": "agreement to start",
    "run.data": "order of reading",
    "run.verified": "agreement to read",
    "save.folder": "a path",
    "save.written": "agreement about a checkpoint",
    "save.published": "agreement about a checkpoint",
}


def test_the_sources_are_read_rightly() -> None:
    """Literal, passed on through a class or a method, and computed."""
    found = sites()
    assert {"step.valid_tokens", "tp.mlp.down", "tp.embedding", "cp.ring", "grads.*"} <= found
    assert set(ELSEWHERE) <= found


@slow
def test_every_site_in_the_sources_is_made_wrong_somewhere() -> None:
    reached = {call.split()[-1] for name in LAYOUTS for call in played(name)[0]}
    computed = {site for site in sites() if any(fnmatch(name, site) for name in reached)}
    assert sites() - computed == set(ELSEWHERE)
    faults = {fault for name in LAYOUTS for fault in played(name)[1]} - {None}
    assert len(faults) >= 100


def _evaluated(rank: int, config: PretrainConfig) -> dict[str, dict[str, float]]:
    stand_in = StandIn()
    stand_in.install()
    ranks = make_ranks(Dims.of(config.parallel, 2), rank=rank, device=torch.device("cpu"))
    stepper = make_stepper(config, 10, ranks)
    batch = share(random_sample(config), 1, ranks.dp.rank, ranks.dp.size)
    found = {}
    for how in ("", "left out", "doubled"):
        stand_in.begin(("all_reduce evaluate.totals", how) if how else None)
        found[how] = held_out_loss(stepper.passes, [batch], ranks, None)
    return found


@pytest.mark.parametrize("layout", [{}, {TP: 2}, {PP: 2}], ids=str)
def test_faults_of_the_evaluation_are_seen(layout: dict[str, Any]) -> None:
    config = configure("gpt2", 2, **layout)
    single = make_stepper(dataclasses.replace(config, parallel=make(ParallelConfig)), 10, Ranks())
    batch = share(random_sample(config), 1, 0, 1)
    one = pytest.approx(held_out_loss(single.passes, [batch], Ranks(), None), rel=1e-6)
    seen = run_ranks(2, _evaluated, config)
    assert all(rank[""] == one for rank in seen)
    for how in ("left out", "doubled"):
        assert not all(rank[how] == one for rank in seen)


def _masks(rank: int) -> dict[str, list[float]]:
    """What a rank's own stream of random numbers makes of the head's dropout."""
    stand_in = StandIn()
    stand_in.install()
    ranks = make_ranks(Dims(tp=2), rank=rank, device=torch.device("cpu"))
    dropout, found = SharedDropout(0.5, ranks.tp), {}
    for how in ("", "left out"):
        stand_in.begin(("all_reduce tp.dropout", how) if how else None)
        torch.manual_seed(rank)
        found[how] = dropout(torch.ones(64)).tolist()
    return found


def test_a_fault_of_masks_that_ranks_share_is_seen() -> None:
    one, other = run_ranks(2, _masks)
    assert one[""] == other[""] and len(set(one[""])) == 2
    assert one["left out"] != other["left out"]


def _scales(rank: int) -> dict[str, list[float]]:
    """What delayed scaling makes of magnitudes that differ between data-parallel ranks."""
    stand_in = StandIn()
    stand_in.install()
    group = make_ranks(Dims(dp=2), rank=rank, device=torch.device("cpu")).shards
    found = {}
    for how in ("", "left out"):
        stand_in.begin((f"all_reduce float8.{group.name}", how) if how else None)
        options = Float8Options(fp8_format="hybrid", fp8_recipe="delayed")
        layer = Scaling(options, PlainCasts(), (False, True))
        history = History([layer], options, torch.device("cpu"), (group,))
        layer.note(0, torch.tensor(1.0 + rank))
        layer.note(1, torch.tensor(2.0 - rank))
        history.end_step()
        found[how] = layer.get_buffer("scale").tolist()
    return found


def test_a_fault_of_scales_that_ranks_share_is_seen() -> None:
    one, other = run_ranks(2, _scales)
    assert one[""] == other[""] == [448.0 / 8, 57344.0 / 8]
    assert one["left out"] != other["left out"]


def sites() -> set[str]:
    """The names at all call sites of collectives; * stands for what is computed."""
    folder = Path(mtk.__file__).parent
    trees = [ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))]
    takers = {name for tree in trees for name in _takers(tree)}
    return {site for tree in trees for site in _sites(tree, takers)}


def _takers(tree: ast.AST) -> Iterator[str]:
    """Functions, and classes with a method __init__, that take a ``site``."""
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef):
                continue
            arguments = (*child.args.args, *child.args.kwonlyargs)
            if any(argument.arg == "site" for argument in arguments):
                inside = isinstance(node, ast.ClassDef) and child.name == "__init__"
                yield node.name if inside else child.name  # type: ignore[attr-defined]


def _sites(tree: ast.AST, takers: set[str]) -> Iterator[str]:
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        if name not in takers:
            continue
        for argument in (*call.args, *(keyword.value for keyword in call.keywords)):
            text = _text(argument)
            if "." in text:
                yield text


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "*" for part in node.values)
    return ""
