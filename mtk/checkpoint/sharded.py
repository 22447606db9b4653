"""Tensors that several ranks hold in blocks: each writes its own, any layout reads its own.

Every rank writes its blocks and a list of them into the same folder; when all are there, one
rank joins the lists to the index of :mod:`mtk.checkpoint.tensors`. The files of a checkpoint
depend on the layout that wrote it, the values do not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtk.checkpoint.tensors import (
    DTYPES,
    FORMAT,
    VERSION,
    dtype_name,
    group_by_size,
    open_chunk,
    save_chunks,
)
from mtk.errors import CheckpointError


@dataclass(frozen=True)
class Block:
    """A part of a tensor of ``shape``, from ``offset`` on."""

    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]


def write_blocks(
    folder: Path, name: str, blocks: Mapping[str, Block], rank: int, max_shard_size: int
) -> None:
    """Write this rank's blocks of the tensors of index ``name`` (empty ones are left out)."""
    content = {
        key: block.tensor.detach().cpu().contiguous()
        for key, block in blocks.items()
        if block.tensor.numel()
    }
    entries: dict[str, Any] = {}
    for number, keys in enumerate(group_by_size(content, max_shard_size), start=1):
        if not keys:
            continue
        file = f"{name}-rank{rank:05}-{number:05}.safetensors"
        save_chunks({key: content[key] for key in keys}, folder / file)
        for key in keys:
            chunk = {"file": file, "key": key, "offset": list(blocks[key].offset)}
            chunk["shape"] = list(content[key].shape)
            entries[key] = {
                "dtype": dtype_name(content[key]),
                "shape": list(blocks[key].shape),
                "chunks": [chunk],
            }
    _list_of(folder, name, rank).write_text(json.dumps(entries), encoding="utf-8")


def join_blocks(folder: Path, name: str, ranks: Iterable[int]) -> None:
    """Make ``name.index.json`` of what ``ranks`` wrote. Raises CheckpointError where their
    blocks do not make up whole tensors."""
    tensors: dict[str, Any] = {}
    for rank in ranks:
        path = _list_of(folder, name, rank)
        for key, entry in json.loads(path.read_text(encoding="utf-8")).items():
            if key in tensors:
                tensors[key]["chunks"] += entry["chunks"]
            else:
                tensors[key] = entry
        path.unlink()
    if not tensors:
        return
    for key, entry in tensors.items():
        written, needed = sum(prod(c["shape"]) for c in entry["chunks"]), prod(entry["shape"])
        if written != needed:
            raise CheckpointError(f"{folder}: ranks wrote {written} of {needed} values of {key}.")
        if _twice((c["offset"], c["shape"]) for c in entry["chunks"]):
            raise CheckpointError(
                f"{folder}: ranks wrote some values of {key} twice, others never."
            )
    index = {"format": FORMAT, "version": VERSION, "tensors": dict(sorted(tensors.items()))}
    (folder / f"{name}.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _list_of(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{name}.rank{rank:05}.json"


def read_block(
    folder: Path, key: str, entry: Mapping[str, Any], offset: tuple[int, ...], size: tuple[int, ...]
) -> Tensor:
    """The block of a tensor at ``offset``, put together from the chunks that touch it.

    entry: of the index, see :func:`mtk.checkpoint.tensors.read_index`. Raises CheckpointError.
    """
    block = torch.empty(size, dtype=DTYPES[entry["dtype"]])
    covered, regions = 0, []
    for chunk in entry["chunks"]:
        # Without its shape a chunk must be opened to know whether it is needed.
        shape = chunk.get("shape") or _shape(folder, key, chunk)
        overlap = _overlap(offset, size, chunk["offset"], shape)
        if overlap is None:
            continue
        with open_chunk(folder, key, chunk) as stream:
            found = stream.get_slice(chunk["key"])
            if list(found.get_shape()) != list(shape):
                raise CheckpointError(f"{folder}/{chunk['file']}: {key} does not fit its index.")
            part = found[overlap.source] if overlap.source else stream.get_tensor(chunk["key"])
        if part.dtype != block.dtype:
            raise CheckpointError(f"{folder}/{chunk['file']}: {key} does not fit its index.")
        block[overlap.target] = part
        regions.append(([side.start for side in overlap.target], list(part.shape)))
        covered += part.numel()
    if covered != block.numel():
        raise CheckpointError(
            f"{folder}: the files hold {covered} of {block.numel()} values of {key} that this "
            f"rank needs."
        )
    if _twice(regions):
        raise CheckpointError(f"{folder}: chunks of {key} overlap, so others of its values lack.")
    return block


def _twice(regions: Iterable[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Whether two blocks (offset, shape) share a value; blocks of one row range are few."""
    active: list[tuple[Sequence[int], Sequence[int]]] = []
    for offset, shape in sorted((list(offset), list(shape)) for offset, shape in regions):
        active = [(o, s) for o, s in active if not o or o[0] + s[0] > offset[0]]
        if any(_overlap(offset, shape, o, s) for o, s in active):
            return True
        active.append((offset, shape))
    return False


def _shape(folder: Path, key: str, chunk: Mapping[str, Any]) -> list[int]:
    with open_chunk(folder, key, chunk) as stream:
        return list(stream.get_slice(chunk["key"]).get_shape())


@dataclass(frozen=True)
class _Overlap:
    """source: in the chunk; target: in the block that is asked for."""

    source: tuple[slice, ...]
    target: tuple[slice, ...]


def _overlap(
    offset: Iterable[int], size: Iterable[int], chunk_offset: Iterable[int], shape: Iterable[int]
) -> _Overlap | None:
    source, target = [], []
    for wanted, length, start, extent in zip(offset, size, chunk_offset, shape, strict=True):
        low, high = max(wanted, start), min(wanted + length, start + extent)
        if low >= high:
            return None
        source.append(slice(low - start, high - start))
        target.append(slice(low - wanted, high - wanted))
    return _Overlap(tuple(source), tuple(target))
