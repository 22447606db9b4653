"""Checkpoints written in one layout and read in another: bit-equal, optimizer included."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.checkpoint.sharded import join_blocks, write_blocks
from mtk.checkpoint.tensors import read_tensors
from mtk.config.pretrain import PretrainConfig
from mtk.parallel.dims import Dims
from mtk.parallel.ranks import make_ranks
from mtk.training.assemble import make_stepper
from mtk.training.state import blocks, restore_optimizer, restore_weights
from mtk.training.step import Stepper
from mtk.verification.observe import random_sample, share
from tests.parallel.layouts import configure
from tests.parallel.ranks import run_ranks

TP = "tensor_model_parallel_size"
SHARDING = "data_parallel_sharding"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {TP: 2}),
    "tp2.sp": (2, {TP: 2, "sequence_parallel": True}),
    "tp4": (4, {TP: 4}),
    "dp2.replicate": (2, {SHARDING: "replicate"}),
    "dp2.optimizer": (2, {SHARDING: "optimizer"}),
    "dp4.full": (4, {SHARDING: "full"}),
    "dp4.hybrid": (4, {SHARDING: "full", "num_distributed_optimizer_instances": 2}),
    "tp2-dp2.full": (4, {TP: 2, SHARDING: "full"}),
}


def _stepper(rank: int, config: PretrainConfig, world: int) -> Stepper:
    ranks = make_ranks(
        Dims.of(config.parallel, world),
        rank=rank,
        device=torch.device("cpu"),
        kv_groups=config.model.query_groups,
        sharded=config.parallel.data_parallel_sharding != "replicate",
    )
    return make_stepper(config, 80, ranks)


def _write(stepper: Stepper, folder: Path) -> None:
    from mtk.parallel.collectives import share_object

    for index in ("model", "optimizer"):
        write_blocks(folder, index, blocks(stepper)[index], stepper.ranks.rank, 10_000)
    share_object(None, stepper.ranks.world, "test")
    # Rank 0 may be ahead of the others: two rounds make sure that all have written.
    torch.distributed.barrier() if stepper.ranks.distributed else None
    if stepper.ranks.world.first:
        for index in ("model", "optimizer"):
            join_blocks(folder, index, range(stepper.ranks.world.size))


def _train_and_save(rank: int, config: PretrainConfig, world: int, folder: Path) -> None:
    stepper = _stepper(rank, config, world)
    for seed in range(2):
        batch = share(random_sample(config, seed), 1, stepper.ranks.dp.rank, stepper.ranks.dp.size)
        stepper.step(batch, 8 * seed)
    _write(stepper, folder)


def _load_and_save(
    rank: int, config: PretrainConfig, world: int, source: Path, folder: Path
) -> None:
    stepper = _stepper(rank, config, world)
    restore_weights(stepper, source)
    restore_optimizer(stepper, source)
    _write(stepper, folder)


def _values(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder, "model") | read_tensors(folder, "optimizer")


def _bytes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint trained in every layout."""
    folders = {}
    for name, (world, layout) in LAYOUTS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        run_ranks(world, _train_and_save, configure("gpt2", world, **layout), world, folders[name])
    return folders


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_any_layout_reads_any_other(
    written: dict[str, Path], tmp_path: Path, source: str, target: str
) -> None:
    """Source -> target -> source: values equal on the way, files equal at the end."""
    there, back = tmp_path / "there", tmp_path / "back"
    there.mkdir()
    back.mkdir()
    world, layout = LAYOUTS[target]
    run_ranks(
        world, _load_and_save, configure("gpt2", world, **layout), world, written[source], there
    )
    world, layout = LAYOUTS[source]
    run_ranks(world, _load_and_save, configure("gpt2", world, **layout), world, there, back)
    before, between = _values(written[source]), _values(there)
    assert before.keys() == between.keys()
    assert all(torch.equal(before[name], between[name]) for name in before)
    assert _bytes(back) == _bytes(written[source])
