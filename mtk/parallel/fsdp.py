"""Data parallelism on FSDP2 (``fully_shard``), in four modes.

replicate: every rank keeps everything (a shard group of one rank, gradients all-reduced).
optimizer: gradients, main weights and optimizer state are sharded; gathered weights stay
from forward to backward (ZeRO-2; Megatron's distributed optimizer). full: gathered weights
are freed after each block as well (ZeRO-3; Rajbhandari et al. 2020). Hybrid: either of the
last two inside groups of ranks, with copies across them (``dims.replicas`` > 1).

Gradients are summed, never averaged: the loss is divided by the global number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mtk.config.parallel import ParallelConfig
from mtk.models.gpt import GPT
from mtk.parallel.compat import finish_backward
from mtk.parallel.groups import Group
from mtk.parallel.pieces import Piece
from mtk.parallel.ranks import Ranks


@dataclass(frozen=True)
class Sharding:
    """Where a set of parameters is sharded: over ``mesh``, as ranks of ``shards``."""

    mesh: DeviceMesh
    shards: Group
    replicas: Group


def shard_data(
    model: GPT,
    ranks: Ranks,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    pieces: dict[str, Piece],
) -> None:
    """Wrap the blocks and then ``model`` itself; parameters become shards in fp32.

    dtype: of the gathered weights and the computation; gradients are reduced in fp32.
    pieces: updated to what this rank holds afterwards. Nothing is done where one rank holds
    the weights.
    """
    if ranks.shards_mesh is None or ranks.expert_mesh is None:
        return
    dense = Sharding(ranks.shards_mesh, ranks.shards, ranks.replicas)
    expert = Sharding(ranks.expert_mesh, ranks.expert_shards, ranks.expert_replicas)
    shardings = {name: dense for name, _ in model.named_parameters()}
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    free = parallel.data_parallel_sharding == "full"
    for index, block in model.layers.items():
        experts = getattr(block.mlp, "experts", None)
        if isinstance(experts, nn.Module):
            _wrap(experts, expert, policy, free)
            prefix = f"layers.{index}.mlp.experts."
            shardings |= {n: expert for n in shardings if n.startswith(prefix)}
        _wrap(block, dense, policy, free)
    # What is left (embedding, final norm, output) is needed at both ends: one unit.
    _wrap(model, dense, policy, free=False)
    for name, sharding in shardings.items():
        pieces[name] = _piece_of_shard(pieces[name], sharding)


def _wrap(module: nn.Module, sharding: Sharding, policy: MixedPrecisionPolicy, free: bool) -> None:
    # One axis where nothing is copied: FSDP2 then has no all-reduce to do.
    mesh = sharding.mesh if sharding.mesh.size(0) > 1 else sharding.mesh["fsdp"]
    fully_shard(module, mesh=mesh, reshard_after_forward=free, mp_policy=policy)
    unit = cast(FSDPModule, module)
    unit.set_gradient_divide_factor(1.0)
    # A factor of one still asks for PREMUL_SUM, which gloo lacks.
    unit.set_force_sum_reduction_for_comms(True)


def _piece_of_shard(piece: Piece, sharding: Sharding) -> Piece:
    """FSDP2 cuts rows as ``torch.chunk`` does: the last ranks may have fewer, or none."""
    shards = sharding.mesh.size(1)
    index = sharding.mesh.get_local_rank("fsdp")
    rows = piece.size[0]
    chunk = -(-rows // shards)
    start = min(index * chunk, rows)
    narrowed = piece.narrow(0, start, min(chunk, rows - start))
    return narrowed.without_copies(sharding.shards).with_copies(sharding.replicas)


def local_tensor(parameter: Tensor) -> Tensor:
    """What this rank stores of a parameter, sharing its memory."""
    return parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter


def fsdp_units(model: nn.Module) -> Iterator[FSDPModule]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module


def gather_weights(model: nn.Module) -> None:
    """Gather all weights now and wait, instead of block by block while forward goes on."""
    for unit in fsdp_units(model):
        unit.unshard()


def hold_gradients(model: nn.Module, *, reduce: bool, reshard: bool | None = None) -> None:
    """Say before a backward pass what becomes of its gradients.

    reduce: block by block while backward goes on. Otherwise they are added up on this rank
    in fp32 and weights stay gathered (unless ``reshard``), until a pass that reduces or
    :func:`reduce_held`.
    """
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(reduce)
        model.set_requires_gradient_sync(reduce)
        model.set_reshard_after_backward(reduce if reshard is None else reshard)


def reduce_held(model: nn.Module) -> None:
    """Reduce all gradients that earlier passes have left on this rank."""
    if isinstance(model, FSDPModule):
        hold_gradients(model, reduce=True)
        finish_backward(model)
