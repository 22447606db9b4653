"""Checkpoints of adapters: what was trained, and a reference to the model it stands beside.

``base.json``: ``{"format": "mtk-base", "version": 1, "digest", "path", "relative"}``; the digest
says which model, the paths (from the root, and from the checkpoint) where it was. Readers merge
the two as they read: W + alpha / rank B A, in fp32.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtk.checkpoint import read_model_config
from mtk.config.lora import LoraConfig
from mtk.config.model import ModelConfig
from mtk.convert.lazy import LazyTensors, Tensors
from mtk.convert.mapping import check_complete
from mtk.convert.source import Source, digest_of, find_source
from mtk.errors import ArtifactError, CheckpointError
from mtk.models.buffers import kept_buffers
from mtk.models.build import build_on_meta
from mtk.models.lora import merged

BASE = "base.json"
FORMAT, VERSION = "mtk-base", 1

# Configuration and weights of a source: ``mtk.convert.open_model.read_native``.
Read = Callable[[Source], tuple[ModelConfig, Tensors]]


def has_adapters(folder: Path) -> bool:
    """Whether a checkpoint's folder holds adapters instead of a whole model."""
    return (folder / BASE).is_file()


def write_base(folder: Path, final: Path, base: Path, digest: str) -> None:
    """Note in ``folder``, which will be ``final``, what its adapters stand beside."""
    record = {
        "format": FORMAT,
        "version": VERSION,
        "digest": digest,
        "path": str(base.resolve()),
        "relative": os.path.relpath(base.resolve(), final.resolve()),
    }
    (folder / BASE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def find_base(folder: Path) -> Source:
    """The model that the adapters in ``folder`` stand beside. Raises CheckpointError where
    neither place holds it any more."""
    record = _read_base(folder)
    wanted, found = record["digest"], []
    for place in (folder / record["relative"], Path(record["path"])):
        if not place.exists():
            found.append(f"{place} (nothing there)")
            continue
        try:
            source = find_source(place)
        except ArtifactError as error:
            found.append(f"{place} ({error})")
            continue
        digest = digest_of(source.inputs())
        if digest == wanted:
            return source
        found.append(f"{place} (digest {digest[:16]}...)")
    raise CheckpointError(
        f"{folder} holds adapters of the model with digest {wanted[:16]}..., which is at none of "
        f"its places: {'; '.join(dict.fromkeys(found))}. Put that model back there."
    )


def _read_base(folder: Path) -> dict[str, Any]:
    path = folder / BASE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT or record["version"] > VERSION:
            raise CheckpointError(
                f"{path} is {record['format']} version {record['version']}; this mtk reads "
                f"{FORMAT} up to version {VERSION}."
            )
        return {key: str(record[key]) for key in ("digest", "path", "relative")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a readable reference: {error!r}.") from error


def apart(source: Source, read: Read) -> tuple[ModelConfig, Tensors]:
    """The model with its adapters beside it: every weight is the checkpoint's own, else the
    base's. Raises ConversionError where the two do not make up the model."""
    config = read_model_config(source.folder)
    own = source.native_tensors()
    model = build_on_meta(config)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    buffers = kept_buffers(model)
    check_complete(own, [*trained, *buffers], f"adapters in {source.folder}")
    _, base = read(find_base(source.folder))
    names = [*dict(model.named_parameters()), *buffers]
    missing = [name for name in names if name not in own and name not in base]
    if missing:
        raise CheckpointError(f"the base of {source.folder} lacks {missing[:5]} (first five).")
    return config, LazyTensors(names, lambda name: own[name] if name in own else base[name])


def merge(source: Source, read: Read) -> tuple[ModelConfig, Tensors]:
    """The model without adapters, in fp32, each weight merged when it is read."""
    config, tensors = apart(source, read)
    names = [name for name in tensors if ".lora." not in name]

    def one(name: str) -> Any:
        stem = name.removesuffix(".weight")
        if f"{stem}.lora.a" not in tensors:
            found = tensors[name]
            return found.float() if found.is_floating_point() else found
        pair = tensors[f"{stem}.lora.a"], tensors[f"{stem}.lora.b"]
        return merged(tensors[name], *pair, config.lora.scale)

    return dataclasses.replace(config, lora=LoraConfig()), LazyTensors(names, one)
