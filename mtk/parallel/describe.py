"""One line about a layout as it was built: who shares what, and what each rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from mtk.config.parallel import ParallelConfig
from mtk.parallel.apply import Placed
from mtk.parallel.collectives import gather_objects
from mtk.parallel.ranks import Ranks

# fp32 main weight, its gradient, and two moments of AdamW.
MAIN_BYTES = 16
SHARDED = {"replicate": "replicated", "optimizer": "optimizer sharded", "full": "fully sharded"}


@dataclass(frozen=True)
class Held:
    """What one rank keeps from step to step. parameters: those it holds; state: bytes of
    weights, gradients and optimizer."""

    parameters: int
    state: int


def held(placed: Placed, dtype: torch.dtype) -> Held:
    """What this rank holds. Weights in ``dtype`` are copies beside the main ones where that is
    not fp32; those that FSDP gathers for a step only are not counted."""
    parameters = state = 0
    for name, parameter in placed.named_parameters().items():
        size = prod(placed.pieces[name].size)
        parameters += size
        if name in placed.frozen:
            state += size * dtype.itemsize
            continue
        copy = 0 if dtype == torch.float32 or isinstance(parameter, DTensor) else dtype.itemsize
        state += size * (MAIN_BYTES + copy)
    return Held(parameters, state)


def describe_layout(
    placed: Placed, ranks: Ranks, parallel: ParallelConfig, dtype: torch.dtype, layers: int
) -> tuple[str, dict[str, Any]]:
    """The line and the same as fields; every rank of the job must call it.

    layers: of the whole model.
    """
    trained = sum(prod(shape) for shape in placed.trained.values())
    everyone: list[Held] = gather_objects(held(placed, dtype), ranks.world, "run.layout")
    whole = sum(prod(shape) for shape in placed.shapes.values())
    fewest, most = (choose(h.parameters for h in everyone) for choose in (min, max))
    state = max(h.state for h in everyone)
    dims = ranks.dims
    fields = {
        "ranks": dims.world,
        "device": ranks.device.type,
        **{name: getattr(dims, name) for name in ("tp", "pp", "cp", "ep", "dp", "replicas")},
        "parameters": whole,
        "parameters_per_rank": most,
        "state_bytes_per_rank": state,
    }
    kept = f"{_bytes(state)} of weights, gradients and optimizer"
    if dims.world == 1:
        text = f"one process on {ranks.device.type}: {_short(whole)} parameters, {kept}"
    else:
        each = _short(most) if fewest == most else f"{_short(fewest)} to {_short(most)}"
        axes = " x ".join(_axes(placed, ranks, parallel, layers))
        text = f"{dims.world} ranks on {ranks.device.type} = {axes}: {_short(whole)} parameters, "
        text += f"{each} a rank with at most {kept}"
    if trained != whole:
        text += f"; {_short(trained)} of them are trained"
        fields["trained_parameters"] = trained
    return text, fields


def _axes(placed: Placed, ranks: Ranks, parallel: ParallelConfig, layers: int) -> list[str]:
    """Each axis of more than one rank, with what was chosen for it."""
    dims, found = ranks.dims, []
    if dims.tp > 1:
        hidden = ", overlapped" if parallel.tp_comm_overlap else ""
        sequence = f" (sequence too{hidden})" if parallel.sequence_parallel else ""
        found.append(f"TP {dims.tp}{sequence}")
    if placed.stages is not None:
        stages = placed.stages
        split = " | ".join(
            "+".join(str(len(stages.layers[stage])) for stage in stages.of(rank))
            for rank in range(dims.pp)
        )
        found.append(f"PP {dims.pp} ({parallel.schedule(layers)}, layers {split})")
    if dims.cp > 1:
        found.append(f"CP {dims.cp} ({parallel.cp_comm_type})")
    if dims.shards > 1:
        how = SHARDED[parallel.data_parallel_sharding]
        how += f", {dims.replicas} copies" if dims.replicas > 1 else ""
        how += f", experts over {dims.ep}" if dims.ep > 1 else ""
        found.append(f"DP {dims.dp} ({how})")
    return found


def _short(count: int) -> str:
    """Three digits: 345 M, 1.71 G."""
    for unit, name in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


def _bytes(count: int) -> str:
    return f"{_short(count)}B" if count >= 1000 else f"{count} B"
