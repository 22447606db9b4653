"""What ``torch.save`` writes: a zip archive, or before torch 1.6 pickles and raw bytes in a row.

Opening reads the pickle only; tensors are mapped from the file when asked for.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from mtk.convert.megatron.pickles import StorageRef, StoredTensor, unpickle
from mtk.errors import ConversionError

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
LOCAL_HEADER = struct.Struct("<4s22xHH")
# What damaged or hostile bytes make zipfile raise; RuntimeError: an entry is encrypted.
ZIP_FAULTS = (zipfile.BadZipFile, RuntimeError, ValueError, struct.error, EOFError)


@dataclass(frozen=True)
class TorchFile:
    """An opened file. content: inert data with a :class:`StoredTensor` for each tensor.

    starts: the byte at which each storage begins, by its key.
    """

    path: Path
    content: Any
    starts: dict[str, int] = field(repr=False)

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The tensor, mapped copy-on-write. Raises ConversionError if the file ends before it, or
        if it is larger than what the file holds of it."""
        storage = stored.storage
        size = storage.numel * storage.dtype.itemsize
        if math.prod(stored.shape) > storage.numel:
            raise ConversionError(
                f"{self.path}: a tensor of shape {list(stored.shape)} in a storage of "
                f"{storage.numel} numbers: it holds the same ones again and again."
            )
        if storage.numel == 0:
            return torch.empty(stored.shape, dtype=storage.dtype)
        try:
            data = np.memmap(self.path, np.uint8, "c", self.starts[storage.key], (size,))
        except (OSError, ValueError) as error:
            raise ConversionError(
                f"{self.path}: storage {storage.key} cannot be read: {error}."
            ) from (error)
        flat = torch.from_numpy(data)
        if flat.data_ptr() % storage.dtype.itemsize:
            flat = flat.clone()
        return flat.view(storage.dtype).as_strided(stored.shape, stored.stride, stored.offset)


def open_torch_file(path: Path) -> TorchFile:
    """Raises ConversionError for a file that is damaged, foreign or hostile."""
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
            stream.seek(0)
            if start == b"PK\x03\x04":
                return _open_zip(path, stream)
            if start[:1] == b"\x80":
                return _open_legacy(path, stream)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error}.") from error
    raise ConversionError(f"{path} is not a file of torch.save (it begins with {start!r}).")


def _open_zip(path: Path, stream: IO[bytes]) -> TorchFile:
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            pickles = [name for name in entries if name.split("/")[1:] == ["data.pkl"]]
            if len(pickles) != 1 or any(name.endswith("/constants.pkl") for name in entries):
                raise ConversionError(f"{path} is no checkpoint: found {sorted(entries)[:5]}.")
            packed = [n for n, e in entries.items() if e.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise ConversionError(f"{path}: {packed[0]} is compressed; torch.save never does.")
            prefix = pickles[0].removesuffix("data.pkl")
            order = f"{prefix}byteorder"
            if order in entries and archive.read(order) != b"little":
                raise ConversionError(f"{path} was written on a big-endian machine.")
            content, storages = unpickle(io.BytesIO(archive.read(pickles[0])), str(path))
            starts = {
                key: _start(stream, path, entries.get(f"{prefix}data/{key}"), storage)
                for key, storage in storages.items()
            }
    except ZIP_FAULTS as error:
        raise ConversionError(f"{path} is damaged or cut short: {error}.") from error
    return TorchFile(path, content, starts)


def _start(
    stream: IO[bytes], path: Path, entry: zipfile.ZipInfo | None, storage: StorageRef
) -> int:
    """Where the bytes of an archive's entry begin."""
    needed = storage.numel * storage.dtype.itemsize
    if entry is None or entry.file_size < needed:
        found = "is missing" if entry is None else f"has {entry.file_size} bytes of {needed}"
        raise ConversionError(f"{path}: storage {storage.key} {found}.")
    stream.seek(entry.header_offset)
    signature, name, extra = LOCAL_HEADER.unpack(stream.read(LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise ConversionError(f"{path}: storage {storage.key} is not where the archive says.")
    return entry.header_offset + LOCAL_HEADER.size + int(name) + int(extra)


def _open_legacy(path: Path, stream: IO[bytes]) -> TorchFile:
    where = str(path)
    magic, protocol, system = (unpickle(stream, where)[0] for _ in range(3))
    if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL or not isinstance(system, dict):
        raise ConversionError(f"{path} is a pickle, but not one of torch.save.")
    if system.get("little_endian") is not True:
        raise ConversionError(f"{path} was written on a big-endian machine.")
    content, storages = unpickle(stream, where)
    keys, _ = unpickle(stream, where)
    if not isinstance(keys, list) or set(map(str, keys)) != set(storages):
        raise ConversionError(f"{path}: the list of storages does not fit the tensors.")
    starts, size = {}, path.stat().st_size
    for key in map(str, keys):
        storage = storages[key]
        stored = stream.read(8)
        starts[key] = stream.tell()
        end = starts[key] + storage.numel * storage.dtype.itemsize
        if len(stored) < 8 or end > size:
            raise ConversionError(f"{path} is cut short: storage {key} ends after the file.")
        if int.from_bytes(stored, "little") != storage.numel:
            raise ConversionError(f"{path}: storage {key} has another length than its tensors say.")
        stream.seek(end)
    return TorchFile(path, content, starts)
