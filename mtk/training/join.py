"""From a place among started processes to the groups of a training's layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from mtk.config.pretrain import PretrainConfig
from mtk.launch.process import Place, join
from mtk.parallel.deterministic import set_deterministic
from mtk.parallel.dims import Dims
from mtk.parallel.groups import Trace
from mtk.parallel.ranks import Ranks, make_ranks
from mtk.training.compiled import compiles, keep_compiled


@contextmanager
def training_ranks(place: Place, config: PretrainConfig) -> Iterator[Ranks]:
    """This process as one rank of the layout: threads, determinism, process group, groups.

    Raises what ``join`` and ``set_deterministic`` raise.
    """
    if config.runtime.num_threads is not None:
        torch.set_num_threads(config.runtime.num_threads)
    compile = compiles(config, place.device)
    set_deterministic(dataclasses.replace(config.runtime, compile=compile))
    if compile:
        keep_compiled()
    with join(place, config.parallel.timeout_seconds) as trace:
        yield ranks_of(place, config, trace)


def ranks_in_turn(
    rank: int, runs: Sequence[PretrainConfig], world: int
) -> Iterator[tuple[PretrainConfig, Ranks]]:
    """Each run with the groups of its layout, on the CPU ranks of one job. Equal groups are made
    once: connecting them costs more than a step."""
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for run in runs:
        place = Place(rank=rank, world=world)
        yield run, Ranks() if world == 1 else ranks_of(place, run, made=made)


def ranks_of(
    place: Place,
    config: PretrainConfig,
    trace: Trace | None = None,
    made: dict[tuple[int, ...], dist.ProcessGroup] | None = None,
) -> Ranks:
    """The groups of the layout; the default process group must exist. made: see
    :func:`~mtk.parallel.ranks.make_ranks`."""
    return make_ranks(
        Dims.of(config.parallel, place.world),
        rank=place.rank,
        device=place.device,
        kv_groups=config.model.query_groups,
        state_groups=config.model.state_groups,
        sharded=config.parallel.data_parallel_sharding != "replicate",
        trace=trace,
        made=made,
    )
