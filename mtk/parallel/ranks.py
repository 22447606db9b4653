"""This process among all ranks: its groups along every axis of the layout."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mtk.parallel.dims import Dims
from mtk.parallel.groups import Group, NoTrace, Trace


@dataclass(frozen=True)
class Ranks:
    """Groups of one rank. With one process all of them have one member.

    kv: tensor-parallel ranks that hold the same key/value heads (more ranks than groups).
    states: the same for the B and C of Mamba layers.
    shards: data x context; shards_mesh: the same as [replicas, fsdp] for FSDP2, None where
    there is one such rank; replicas: those that hold the same shard. expert_*: the same for
    experts, where the mesh may be of one rank. ends: first and last pipeline stage (a group
    of one on the stages between).
    """

    dims: Dims = Dims()
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    world: Group = Group("world")
    tp: Group = Group("tp")
    cp: Group = Group("cp")
    dp: Group = Group("dp")
    pp: Group = Group("pp")
    ep: Group = Group("ep")
    shards: Group = Group("shards")
    expert_shards: Group = Group("expert_shards")
    ends: Group = Group("ends")
    kv: Group = Group("kv")
    states: Group = Group("states")
    replicas: Group = Group("replicas")
    expert_replicas: Group = Group("expert_replicas")
    shards_mesh: DeviceMesh | None = None
    expert_mesh: DeviceMesh | None = None
    trace: Trace = field(default_factory=NoTrace)

    @property
    def distributed(self) -> bool:
        return self.world.size > 1


AXES = ("world", "tp", "cp", "dp", "pp", "ep", "shards", "expert_shards", "ends")


def make_ranks(
    dims: Dims,
    *,
    rank: int,
    device: torch.device,
    kv_groups: int | None = None,
    state_groups: int | None = None,
    sharded: bool = True,
    trace: Trace | None = None,
    made: dict[tuple[int, ...], dist.ProcessGroup] | None = None,
) -> Ranks:
    """Build all groups of a layout; every rank of the job must call it at the same time.

    The default process group must exist when ``dims.world`` > 1 and have that size.
    kv_groups: key/value heads of the model. state_groups: groups of its Mamba layers. sharded:
    FSDP shards over ``shards`` (else it keeps whole copies on each of them). made: groups by
    their ranks that earlier layouts of this process have made; they are used again, and new
    ones added.
    """
    trace = trace or NoTrace()
    if dims.world == 1:
        return Ranks(dims, rank, device, trace=trace)
    made = {} if made is None else made
    groups = {axis: _group(axis, dims.partition(axis), rank, made, trace) for axis in AXES}
    for name, shared in (("kv", kv_groups), ("states", state_groups)):
        groups[name] = _group(name, _sharing(dims, shared), rank, made, trace)
    trace.know({name: group.ranks for name, group in groups.items()})
    meshes: dict[str, DeviceMesh | None] = {"shards": None, "expert_shards": None}
    replicas = {"shards": Group("replicas"), "expert_shards": Group("expert_replicas")}
    for axis in meshes if dims.shards > 1 else ():
        copies = dims.replicas if sharded else groups[axis].size
        rows, columns = _rows_and_columns(dims.partition(axis), copies)
        replicas[axis] = _group(replicas[axis].name, columns, rank, made, trace)
        meshes[axis] = _mesh(rows, columns, rank, device, made, groups[axis])
    return Ranks(
        dims,
        rank,
        device,
        **groups,
        replicas=replicas["shards"],
        expert_replicas=replicas["expert_shards"],
        shards_mesh=meshes["shards"],
        expert_mesh=meshes["expert_shards"],
        trace=trace,
    )


def _sharing(dims: Dims, groups: int | None) -> list[tuple[int, ...]]:
    """Neighbours in tp that share a group: tp / groups of them where that is > 1."""
    together = max(1, dims.tp // groups) if groups else 1
    return [
        ranks[k : k + together]
        for ranks in dims.partition("tp")
        for k in range(0, dims.tp, together)
    ]


def _group(
    name: str,
    partition: list[tuple[int, ...]],
    rank: int,
    made: dict[tuple[int, ...], dist.ProcessGroup],
    trace: Trace,
) -> Group:
    """The member of ``partition`` that ``rank`` belongs to; equal groups are made once."""
    mine = Group(name, (rank,), 0, None, trace)
    for ranks in partition:
        if len(set(ranks)) == 1:
            continue
        if ranks not in made:
            made[ranks] = _new_group(ranks, name)
        if rank in ranks:
            mine = Group(name, ranks, ranks.index(rank), made[ranks], trace)
    return mine


def _rows_and_columns(
    partition: list[tuple[int, ...]], copies: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Each group as ``copies`` rows: neighbours in a row shard, columns hold copies."""
    shards = len(partition[0]) // copies
    rows = [r[k * shards : (k + 1) * shards] for r in partition for k in range(copies)]
    return rows, [r[k::shards] for r in partition for k in range(shards)]


def _new_group(ranks: tuple[int, ...], name: str) -> dist.ProcessGroup:
    """With the timeout of the default group, which torch does not hand down by itself."""
    default = dist.distributed_c10d._get_default_group()
    options = getattr(default._get_backend(torch.device("cpu")), "options", None)
    timeout = getattr(options, "_timeout", None)
    made: dist.ProcessGroup = dist.new_group(list(ranks), timeout=timeout, group_desc=name)
    return made


def _mesh(
    rows: list[tuple[int, ...]],
    columns: list[tuple[int, ...]],
    rank: int,
    device: torch.device,
    made: dict[tuple[int, ...], dist.ProcessGroup],
    group: Group,
) -> DeviceMesh:
    """[replicas, fsdp] of the ranks of ``group``."""
    handles = []
    for kind, lists in (("replicas", columns), ("fsdp", rows)):
        for ranks in lists:
            # FSDP2 needs a real group for each axis, also one of a single rank.
            if ranks not in made:
                made[ranks] = _new_group(ranks, kind)
        handles.append(next(made[ranks] for ranks in lists if rank in ranks))
    layout = torch.tensor(group.ranks).view(-1, len(rows[0]))
    return DeviceMesh.from_group(handles, device.type, layout, mesh_dim_names=("replicas", "fsdp"))
