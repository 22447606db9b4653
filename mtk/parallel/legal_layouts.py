"""Every legal layout of a number of ranks, with a short name each, and few that cover all pairs.

All combinations are made and then filtered by the rules that refuse a user's configuration,
so that the parity matrix and the refusals cannot disagree. A technique over one rank is the
same as none and makes no layout of its own. Knows no torch and starts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, product
from typing import Any

from mtk.config.layout_rules import stacked_layers
from mtk.config.model import ModelConfig
from mtk.config.nearest import divisors
from mtk.config.parallel import ParallelConfig
from mtk.config.pretrain import BatchConfig

CP_KINDS = {"p2p": "ring", "all_gather": "gather", "a2a": "a2a"}
SCHEDULES = ("1f1b", "interleaved", "zero-bubble", "zbv")

Options = dict[str, Any]


def legal_layouts(world: int, model: ModelConfig, batch: BatchConfig) -> Iterator[ParallelConfig]:
    """Each legal layout of ``world`` ranks for this model and batch; ``nproc`` is ``world``."""
    for options in _combinations(world, model):
        layout = ParallelConfig(nproc=world, **options)
        if not any(_problems(layout, model, batch, world)):
            yield layout


def _problems(
    layout: ParallelConfig, model: ModelConfig, batch: BatchConfig, world: int
) -> Iterator[object]:
    yield from layout.problems()
    yield from layout.problems_with(model)
    yield from layout.problems_with_world(model, batch, world)


def _combinations(world: int, model: ModelConfig) -> Iterator[Options]:
    """Every product of techniques over ``world`` ranks, legal or not."""
    sizes = divisors(world)
    for tp, pp, cp in product(sizes, repeat=3):
        if world % (tp * pp * cp):
            continue
        parts = (_tensor(tp), _pipeline(pp, model), _context(cp), _experts_data(world, tp * pp))
        for chosen in product(*map(list, parts)):
            yield {key: value for options in chosen for key, value in options.items()}


def _tensor(tp: int) -> Iterator[Options]:
    for sequence in (False, True)[: 1 if tp == 1 else 2]:
        yield {"tensor_model_parallel_size": tp, "sequence_parallel": sequence}


def _pipeline(pp: int, model: ModelConfig) -> Iterator[Options]:
    if pp == 1:
        yield {}
        return
    layers = stacked_layers(model)
    for schedule, chunk in product(SCHEDULES, (None, *range(1, layers + 1))):
        if schedule in ("interleaved", "zbv") and chunk is not None and layers // chunk == 2 * pp:
            continue  # the two stages a rank that these schedules have anyway
        yield {
            "pipeline_model_parallel_size": pp,
            "pipeline_schedule": schedule,
            "num_layers_per_virtual_pipeline_stage": chunk,
        }


def _context(cp: int) -> Iterator[Options]:
    for kind in CP_KINDS if cp > 1 else ("p2p",):
        yield {"context_parallel_size": cp, "cp_comm_type": kind}


def _experts_data(world: int, per_shard: int) -> Iterator[Options]:
    """Experts and data parallelism share the data x context ranks."""
    shards = world // per_shard
    modes: list[tuple[str, int]] = [("replicate", 1)]
    if shards > 1:
        modes += product(("optimizer", "full"), divisors(shards))
    for ep, (sharding, copies) in product(divisors(shards), modes):
        yield {
            "expert_model_parallel_size": ep,
            "data_parallel_sharding": sharding,
            "num_distributed_optimizer_instances": copies,
        }


def data_parallel_size(layout: ParallelConfig) -> int:
    """Copies of the model, of a layout whose ``nproc`` is the number of ranks."""
    return layout.nproc // layout.model_parallel_size


def name(layout: ParallelConfig) -> str:
    """A stable name such as ``tp2.sp-pp2.interleaved.c1-cp2.ring-ep2-dp2.full``.

    c1: layers of a virtual stage; x2: copies of the sharded state. ``nproc`` must be the
    number of ranks. One process is ``single``.
    """
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    cp, ep = layout.context_parallel_size, layout.expert_model_parallel_size
    dp, chunk = data_parallel_size(layout), layout.num_layers_per_virtual_pipeline_stage
    parts = []
    if tp > 1:
        overlap = ".overlap" if layout.tp_comm_overlap else ""
        parts.append(f"tp{tp}{'.sp' if layout.sequence_parallel else ''}{overlap}")
    if pp > 1:
        schedule = layout.pipeline_schedule or ("interleaved" if chunk else "1f1b")
        virtual = f".c{chunk}" if chunk else ""
        split = "".join(f".{layers}" for layers in layout.pipeline_split or ())
        parts.append(f"pp{pp}.{schedule}{virtual}{split}")
    if cp > 1:
        parts.append(f"cp{cp}.{CP_KINDS[layout.cp_comm_type]}")
    if ep > 1:
        parts.append(f"ep{ep}")
    if dp * cp > 1:
        copies = layout.num_distributed_optimizer_instances
        hybrid = f".x{copies}" if copies > 1 else ""
        parts.append(f"dp{dp}.{layout.data_parallel_sharding}{hybrid}")
    return "-".join(parts) or "single"


def techniques(layout: ParallelConfig) -> frozenset[str]:
    """What of the parallel core a layout exercises."""
    found = set()
    if layout.tensor_model_parallel_size > 1:
        found.add("tp.sp" if layout.sequence_parallel else "tp")
    if layout.pipeline_model_parallel_size > 1:
        virtual = layout.num_layers_per_virtual_pipeline_stage or layout.pipeline_split
        kind = ".virtual" if virtual and layout.pipeline_schedule == "zero-bubble" else ""
        found.add(f"pp.{layout.pipeline_schedule or '1f1b'}{kind}")
    if layout.context_parallel_size > 1:
        found.add(f"cp.{CP_KINDS[layout.cp_comm_type]}")
    if layout.expert_model_parallel_size > 1:
        found.add("ep")
    if data_parallel_size(layout) > 1:
        found.add("dp")
    if data_parallel_size(layout) * layout.context_parallel_size > 1:
        hybrid = ".hybrid" if layout.num_distributed_optimizer_instances > 1 else ""
        found.add(f"shards.{layout.data_parallel_sharding}{hybrid}")
    return frozenset(found)


def pairwise_subset(layouts: Iterable[ParallelConfig]) -> list[ParallelConfig]:
    """Few of ``layouts`` in which every pair of techniques that any of them has occurs.

    Greedy: the layout with most pairs still missing, of those with fewest ranks, of those
    the first by name. The same layouts give the same subset, whatever their order.
    """
    cheapest: dict[frozenset[str], ParallelConfig] = {}
    for layout in sorted(layouts, key=_cost):
        cheapest.setdefault(techniques(layout), layout)
    pairs = {tags: _pairs(tags) for tags in cheapest}
    missing = set().union(*pairs.values())
    chosen: list[ParallelConfig] = []
    while missing:
        best = min(cheapest, key=lambda tags: (-len(pairs[tags] & missing), _cost(cheapest[tags])))
        chosen.append(cheapest[best])
        missing -= pairs[best]
    return chosen


def _pairs(tags: frozenset[str]) -> set[tuple[str, ...]]:
    """Pairs of techniques; a technique that stands alone counts too."""
    ordered: Sequence[str] = sorted(tags)
    return {*combinations(ordered, 2), *((tag,) for tag in ordered)}


def _cost(layout: ParallelConfig) -> tuple[int, str]:
    return layout.nproc, name(layout)
