"""Checkpoints written in one layout and read in another: bit-equal, optimizer included."""

from __future__ import annotations

import hashlib
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.checkpoint.sharded import Block, join_blocks, read_block, write_blocks
from mtk.checkpoint.tensors import read_index, read_tensors
from mtk.config.pretrain import PretrainConfig
from mtk.errors import CheckpointError
from mtk.parallel.collectives import gather_objects
from mtk.parallel.dims import Dims
from mtk.parallel.ranks import make_ranks
from mtk.training.assemble import make_stepper
from mtk.training.state import blocks, restore_optimizer, restore_weights
from mtk.training.step import Stepper
from mtk.verification.observe import random_sample, share
from tests.parallel.ranks import run_ranks
from tests.parallel.test_expert import moe_run

TP, PP, CP = (f"{a}_parallel_size" for a in ("tensor_model", "pipeline_model", "context"))
EP, SP = "expert_model_parallel_size", "sequence_parallel"
SCHEDULE, SHARDING = "pipeline_schedule", "data_parallel_sharding"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2.sp": (2, {TP: 2, SP: True}),
    "pp2.zbv": (2, {PP: 2, SCHEDULE: "zbv"}),
    "dp2.optimizer": (2, {SHARDING: "optimizer"}),
    "ep2": (2, {EP: 2}),
    "tp4": (4, {TP: 4}),
    "dp2.replicate": (2, {SHARDING: "replicate"}),
    "dp4.hybrid": (4, {SHARDING: "full", "num_distributed_optimizer_instances": 2}),
    "pp2.uneven": (2, {PP: 2, "pipeline_split": (3, 1)}),
    "cp2": (2, {CP: 2}),
    "ep2-tp2": (4, {EP: 2, TP: 2}),
    "pp2-dp2.full-ep2": (4, {PP: 2, SHARDING: "full", EP: 2}),
}
FAST = ("tp2.sp", "pp2.zbv", "dp2.optimizer", "ep2")
# Embeddings are tied: two stages hold the same matrix.
MODEL = {
    "num_layers": 4,
    "untie_embeddings_and_output_weights": False,
    # Biases are state that no optimizer knows.
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 16,
    "moe_shared_expert_gate": True,
}


def _config(name: str) -> PretrainConfig:
    world, layout = LAYOUTS[name]
    return moe_run(world, MODEL, **layout)


def _stepper(rank: int, name: str) -> Stepper:
    config, world = _config(name), LAYOUTS[name][0]
    ranks = make_ranks(
        Dims.of(config.parallel, world),
        rank=rank,
        device=torch.device("cpu"),
        kv_groups=config.model.query_groups,
        state_groups=config.model.state_groups,
        sharded=config.parallel.data_parallel_sharding != "replicate",
    )
    return make_stepper(config, 80, ranks)


def _write(stepper: Stepper, folder: Path) -> None:
    world = stepper.ranks.world
    folder.mkdir(parents=True, exist_ok=True)
    for index in ("model", "optimizer"):
        write_blocks(folder, index, blocks(stepper)[index], stepper.ranks.rank, 10_000)
    gather_objects(None, world, "test")
    if world.first:
        for index in ("model", "optimizer"):
            join_blocks(folder, index, range(world.size))


def _train(rank: int, name: str, folder: Path) -> None:
    """Other data in each layout: whatever stayed of another checkpoint would show."""
    stepper, seed = _stepper(rank, name), list(LAYOUTS).index(name)
    sample = random_sample(_config(name), seed).rows(0, 4)
    for step in range(2):
        batch = share(sample, 1, stepper.ranks.dp.rank, stepper.ranks.dp.size)
        stepper.step(batch, 4 * step)
    _write(stepper, folder)


def _convert(rank: int, name: str, pairs: list[tuple[Path, Path]]) -> None:
    """Read each first folder in this layout and write what was read to the second."""
    stepper = _stepper(rank, name)
    for source, target in pairs:
        restore_weights(stepper, source)
        restore_optimizer(stepper, source)
        _write(stepper, target)


def _values(folder: Path) -> dict[str, torch.Tensor]:
    weights, state = read_tensors(folder, "model"), read_tensors(folder, "optimizer")
    biases = [name for name in weights if name.endswith("expert_bias")]
    assert len(biases) == 2 and all(weights[name].any() for name in biases)
    trained = len(weights) - len(biases)
    assert not weights.keys() & state.keys() and len(state) == 3 * trained
    return weights | state


def _bytes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def _damaged(folder: Path, change: dict[str, Any]) -> dict[str, Any]:
    """Rows 0-1 and 2-3 of a [4, 3] tensor from two ranks; ``change`` of the second chunk."""
    whole = torch.arange(12.0).reshape(4, 3)
    for rank in (0, 1):
        block = Block(whole[2 * rank : 2 * rank + 2], (4, 3), (2 * rank, 0))
        write_blocks(folder, "model", {"w": block}, rank, 1000)
    join_blocks(folder, "model", (0, 1))
    entry = read_index(folder, "model")["w"]
    assert torch.equal(read_block(folder, "w", entry, (1, 0), (3, 3)), whole[1:])
    entry["chunks"][1] |= change
    return entry


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": [1, 0]}, "overlap"),
        ({"offset": [3, 0]}, "hold 9 of 12"),
        ({"shape": [1, 3]}, "does not fit its index"),
        ({"file": "../model-rank00001-00001.safetensors"}, "points outside"),
        ({"file": "model-rank00002-00001.safetensors"}, "cannot be read"),
        ({"key": "v"}, "cannot be read"),
    ],
    ids=str,
)
def test_damaged_chunks_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Never read as whatever was in memory before."""
    entry = _damaged(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        read_block(tmp_path, "w", entry, (0, 0), (4, 3))


def test_a_block_that_two_ranks_wrote_is_refused(tmp_path: Path) -> None:
    """As many values as needed, but row 1 twice and row 3 never."""
    for rank, start in ((0, 0), (1, 1)):
        block = Block(torch.zeros(2, 3), (4, 3), (start, 0))
        write_blocks(tmp_path, "model", {"w": block}, rank, 1000)
    with pytest.raises(CheckpointError, match="twice"):
        join_blocks(tmp_path, "model", (0, 1))


@pytest.mark.parametrize("names", [FAST, pytest.param(tuple(LAYOUTS), marks=pytest.mark.slow)])
def test_any_layout_reads_any_other(tmp_path: Path, names: tuple[str, ...]) -> None:
    """A -> B -> A for every ordered pair: values equal on the way, files equal at the end."""

    def run(function: Any, name: str, *arguments: Any) -> None:
        run_ranks(LAYOUTS[name][0], function, name, *arguments)

    pairs = list(permutations(names, 2))
    for name in names:
        run(_train, name, tmp_path / name)
    for target in names:
        wanted = [source for source, other in pairs if other == target]
        run(_convert, target, [(tmp_path / s, tmp_path / f"{s} as {target}") for s in wanted])
    for source in names:
        wanted = [target for other, target in pairs if other == source]
        there = [tmp_path / f"{source} as {t}" for t in wanted]
        run(_convert, source, [(t, t.with_name(f"{t.name} and back")) for t in there])
    wrong = []
    for source in names:
        before, files = _values(tmp_path / source), _bytes(tmp_path / source)
        for target in (target for other, target in pairs if other == source):
            between = _values(tmp_path / f"{source} as {target}")
            equal = before.keys() == between.keys()
            if not equal or not all(torch.equal(before[n], between[n]) for n in before):
                wrong.append(f"{source} -> {target}")
            if _bytes(tmp_path / f"{source} as {target} and back") != files:
                wrong.append(f"{source} -> {target} -> {source}")
    assert wrong == []
