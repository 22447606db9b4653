"""Observations as files, for ranks to hand to the first of them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save_file

from mtk.verification.observe import Blocks, Observation

PARTS = ("gradients", "weights", "buffers")


def write_observation(observation: Observation, path: Path) -> None:
    """One safetensors file; scalars and offsets stand in its metadata."""
    arrays = {}
    offsets = {}
    for part in PARTS:
        for name, offset, array in getattr(observation, part):
            arrays[f"{part}.{name}"] = array
            offsets[f"{part}.{name}"] = list(offset)
    scalars = [observation.loss, observation.norm, *observation.balance]
    metadata = {"offsets": offsets, "scalars": scalars, "drifted": observation.drifted}
    save_file(arrays, path, {key: json.dumps(value) for key, value in metadata.items()})


def read_observation(path: Path) -> Observation:
    """What :func:`write_observation` wrote."""
    parts: dict[str, Blocks] = {part: [] for part in PARTS}
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        for key, offset in json.loads(metadata["offsets"]).items():
            part, name = key.split(".", 1)
            parts[part].append((name, tuple(offset), file.get_tensor(key)))
    loss, norm, *balance = json.loads(metadata["scalars"])
    return Observation(
        loss,
        norm,
        parts["gradients"],
        parts["weights"],
        tuple(balance),
        parts["buffers"],
        tuple(json.loads(metadata["drifted"])),
    )
