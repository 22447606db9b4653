"""Named tensors in sharded safetensors files with a JSON index.

``NAME.index.json``: ``{"format": "mtk-tensors", "version": 1, "tensors": {tensor name:
{"dtype", "shape", "chunks": [{"file", "key", "offset"}]}}}``. A chunk is a block of the
global tensor that starts at ``offset`` (with ``shape``, where ranks wrote blocks); one writer
makes one chunk a tensor, ranks that hold parts of a tensor each write theirs
(:mod:`mtk.checkpoint.sharded`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtk.errors import CheckpointError

FORMAT, VERSION = "mtk-tensors", 1
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def write_tensors(
    folder: Path, name: str, tensors: Mapping[str, Tensor], max_shard_size: int = 2_000_000_000
) -> None:
    """Write ``name.index.json`` and its files; the same tensors give the same bytes."""
    shards = group_by_size(tensors, max_shard_size)
    entries: dict[str, Any] = {}
    for number, keys in enumerate(shards, start=1):
        file = f"{name}-{number:05}-of-{len(shards):05}.safetensors"
        content = {key: tensors[key].detach().cpu().contiguous() for key in keys}
        save_chunks(content, folder / file)
        for key, tensor in content.items():
            entries[key] = {
                "dtype": dtype_name(tensor),
                "shape": list(tensor.shape),
                "chunks": [{"file": file, "key": key, "offset": [0] * tensor.ndim}],
            }
    index = {"format": FORMAT, "version": VERSION, "tensors": entries}
    (folder / f"{name}.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def save_chunks(content: Mapping[str, Tensor], path: Path) -> None:
    """One safetensors file. Raises CheckpointError where it cannot be written (a full disk)."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(content), path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be written: {error}.") from error


def read_tensors(folder: Path, name: str, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """All tensors of an index, or those named. Raises CheckpointError."""
    return dict(iterate_tensors(folder, name, names))


def iterate_tensors(
    folder: Path, name: str, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """One whole tensor at a time, put together from its chunks. Raises CheckpointError."""
    entries = read_index(folder, name)
    for key in entries if names is None else names:
        if key not in entries:
            raise CheckpointError(f"{folder}/{name}.index.json has no tensor {key}.")
        yield key, _assemble(folder, key, entries[key])


def read_index(folder: Path, name: str) -> dict[str, Any]:
    """The ``tensors`` part of an index. Raises CheckpointError."""
    path = folder / f"{name}.index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT or index["version"] > VERSION:
            raise CheckpointError(
                f"{path} is {index['format']} version {index['version']}; this mtk reads "
                f"{FORMAT} up to version {VERSION}."
            )
        return dict(index["tensors"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a readable tensor index: {error!r}.") from error


def _assemble(folder: Path, key: str, entry: Mapping[str, Any]) -> Tensor:
    whole = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
    covered = 0
    for chunk in entry["chunks"]:
        block = _read_block(folder, key, chunk)
        region = tuple(
            slice(start, start + size)
            for start, size in zip(chunk["offset"], block.shape, strict=True)
        )
        if whole[region].shape != block.shape or block.dtype != whole.dtype:
            raise CheckpointError(f"{folder}/{chunk['file']}: {key} does not fit its index entry.")
        whole[region] = block
        covered += block.numel()
    if covered != whole.numel():
        raise CheckpointError(
            f"{folder}: the files hold {covered} of the {whole.numel()} values of {key}."
        )
    return whole


@contextmanager
def open_chunk(folder: Path, key: str, chunk: Mapping[str, Any]) -> Iterator[Any]:
    """The safetensors file that holds a chunk of tensor ``key``. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    file = folder / chunk["file"]
    if Path(chunk["file"]).name != chunk["file"]:
        raise CheckpointError(f"{folder}: {key} points outside the checkpoint ({chunk['file']}).")
    try:
        with safe_open(file, framework="pt") as stream:
            yield stream
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read for {key}: {error}.") from error


def _read_block(folder: Path, key: str, chunk: Mapping[str, Any]) -> Tensor:
    with open_chunk(folder, key, chunk) as stream:
        return stream.get_tensor(chunk["key"])  # type: ignore[no-any-return]


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def group_by_size(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Names in order, cut into groups of at most ``limit`` bytes (or one tensor)."""
    shards: list[list[str]] = [[]]
    size = 0
    for key in sorted(tensors):
        nbytes = tensors[key].numel() * tensors[key].element_size()
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += nbytes
    return shards
