"""Token sequences on disk: Megatron's ``.bin``/``.idx`` pair (MMapIndexedDataset).

``.bin`` is the concatenation of all sequences without a header. ``.idx`` is, little-endian
and without padding: 9 bytes magic, uint64 version 1, uint8 dtype code, uint64 S sequences,
uint64 D = documents + 1, then S int32 lengths (tokens), S int64 byte offsets into ``.bin``,
D int64 document boundaries (sequence numbers, first 0, last S).

A prefix ``P`` names the pair ``P.bin``, ``P.idx``.
"""

from __future__ import annotations

import shutil
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mtk.data.mapped import mapped_bytes
from mtk.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: tuple[tuple[int, str], ...] = (
    (1, "<u1"),
    (2, "<i1"),
    (3, "<i2"),
    (4, "<i4"),
    (5, "<i8"),
    (6, "<f8"),
    (7, "<f4"),
    (8, "<u2"),
)
# Megatron's writer leaves uint16 here, well below the 65,536 it could hold.
UINT16_VOCABULARY = 65_500
_BLOCK = 1 << 20  # sequences checked or written at a time
_LONGEST = 2**31 - 1

Tokens = npt.NDArray[Any]


def bin_path(prefix: str | Path) -> Path:
    """``P.bin`` (the prefix may itself contain dots)."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """``P.idx`` (the prefix may itself contain dots)."""
    return Path(f"{prefix}.idx")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 below a vocabulary of 65,500 (unpadded), else int32, as Megatron writes."""
    return np.dtype("<u2") if vocab_size < UINT16_VOCABULARY else np.dtype("<i4")


class IndexedDataset:
    """Random access to the sequences of ``P.bin``/``P.idx`` through memory maps.

    Raises DataError at opening if a file is missing, the index is not one, or the two
    files disagree (a short ``.bin``, or a length array that leaves out tokens).
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        index, tokens = idx_path(prefix), bin_path(prefix)
        for path in (index, tokens):
            if not path.is_file():
                raise DataError(f"{path} does not exist; the dataset {prefix} needs both files.")
        self.dtype, count, boundaries = _read_header(index)
        raw = mapped_bytes(index)
        lengths_end = HEADER.size + 4 * count
        pointers_end = lengths_end + 8 * count
        self.sizes: npt.NDArray[np.int32] = raw[HEADER.size : lengths_end].view("<i4")
        self.pointers: npt.NDArray[np.int64] = raw[lengths_end:pointers_end].view("<i8")
        self.document_indices: npt.NDArray[np.int64] = raw[
            pointers_end : pointers_end + 8 * boundaries
        ].view("<i8")
        self.num_tokens = _check(self, index, tokens)
        empty = np.empty(0, self.dtype)
        self._tokens: Tokens = mapped_bytes(tokens).view(self.dtype) if self.num_tokens else empty

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    @property
    def tokens(self) -> Tokens:
        """All tokens of all sequences, a read-only view [num_tokens]."""
        return self._tokens

    def get(self, i: int, offset: int = 0, length: int | None = None) -> Tokens:
        """Tokens ``offset .. offset + length`` of sequence ``i`` (a read-only view, [length]).

        length: all the rest by default. Raises IndexError outside the dataset or sequence.
        """
        size = int(self.sizes[i])
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(f"tokens {offset}..{offset + length} of a sequence of {size} tokens")
        start = int(self.pointers[i]) // self.dtype.itemsize + offset
        return self._tokens[start : start + length]

    def __getitem__(self, i: int) -> Tokens:
        return self.get(i)

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[Path]]:
        # Loader processes map the files again instead of receiving the tokens.
        return (IndexedDataset, (self.prefix,))


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    """dtype, number of sequences, number of boundaries; checks the size of the whole file."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(HEADER.size)
    if header[: len(MAGIC)] != MAGIC:
        raise DataError(
            f"{path} is not a Megatron index: it begins with {header[: len(MAGIC)]!r}, "
            f"expected {MAGIC!r}. Give the prefix of a dataset that mtk preprocess wrote."
        )
    if len(header) < HEADER.size:
        raise DataError(f"{path} has {size} bytes, the header alone needs {HEADER.size}.")
    _, version, code, count, boundaries = HEADER.unpack(header)
    if version != VERSION:
        raise DataError(f"{path} has version {version}, expected {VERSION}.")
    names = dict(DTYPES)
    if code not in names:
        raise DataError(f"{path} has dtype code {code}, expected one of {sorted(names)}.")
    expected = HEADER.size + 12 * count + 8 * boundaries
    if size != expected:
        raise DataError(
            f"{path} has {size} bytes, expected {expected} for {count} sequences and "
            f"{boundaries} document boundaries: it is {_state(size, expected, count)}."
        )
    return np.dtype(names[code]), count, boundaries


def _state(size: int, expected: int, count: int) -> str:
    if size < expected:
        return "truncated"
    if size - expected == count:
        return "an index with sequence modes (multimodal), which mtk does not read"
    return "overlong"


def _check(dataset: IndexedDataset, index: Path, tokens: Path) -> int:
    """Every length, offset and boundary fits the others and ``.bin``; returns the tokens."""
    itemsize = dataset.dtype.itemsize
    total = 0
    for start in range(0, len(dataset.sizes), _BLOCK):
        lengths = dataset.sizes[start : start + _BLOCK].astype(np.int64)
        if lengths.min() < 0:
            first = start + int(np.argmax(lengths < 0))
            raise DataError(f"{index}: sequence {first} has the length {dataset.sizes[first]}.")
        ends = np.cumsum(lengths) + total
        wrong = dataset.pointers[start : start + _BLOCK] != (ends - lengths) * itemsize
        if wrong.any():
            first = start + int(np.argmax(wrong))
            offset = int((ends - lengths)[first - start]) * itemsize
            raise DataError(
                f"{index}: sequence {first} is said to start at byte {dataset.pointers[first]}, "
                f"expected {offset} from the lengths before it."
            )
        total = int(ends[-1])
    found, expected = tokens.stat().st_size, total * itemsize
    if found != expected:
        raise DataError(
            f"{tokens} has {found} bytes, expected {expected}: {index.name} counts {total} tokens "
            f"of {itemsize} bytes. It was truncated, belongs to another index, or comes from a "
            f"Megatron release that did not count the appended EOD; preprocess the corpus again."
        )
    _check_boundaries(dataset.document_indices, len(dataset.sizes), index)
    return total


def _check_boundaries(boundaries: npt.NDArray[np.int64], count: int, index: Path) -> None:
    ends = (int(boundaries[0]), int(boundaries[-1])) if len(boundaries) else None
    if ends != (0, count):
        raise DataError(
            f"{index}: document boundaries run from/to {ends}, expected (0, {count}) for "
            f"{count} sequences."
        )
    for start in range(0, len(boundaries) - 1, _BLOCK):
        steps = np.diff(boundaries[start : start + _BLOCK + 1])
        if (steps < 0).any():
            first = start + int(np.argmax(steps < 0)) + 1
            raise DataError(f"{index}: document boundary {first} lies before the one ahead of it.")


class IndexedDatasetWriter:
    """Writes ``P.bin`` as documents arrive and ``P.idx`` at :meth:`finalize`.

    Memory: 4 bytes a sequence and 8 a document; tokens go straight to the file. As a
    context manager it finalizes, or removes its files if the block raises.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in [np.dtype(name) for _, name in DTYPES]:
            raise ValueError(f"{self.dtype} has no code in the index format")
        self.prefix = Path(prefix)
        self._lengths = array("i")
        self._boundaries = array("q", [0])
        self.num_tokens = 0
        self._stream: BinaryIO = bin_path(prefix).open("wb", buffering=1 << 20)

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finalize()
        else:
            self._stream.close()
            bin_path(self.prefix).unlink(missing_ok=True)

    @property
    def num_sequences(self) -> int:
        return len(self._lengths)

    @property
    def num_documents(self) -> int:
        return len(self._boundaries) - 1

    def add_document(self, tokens: npt.ArrayLike, lengths: Sequence[int]) -> None:
        """One document: its tokens [sum(lengths)] cut into sequences of ``lengths``.

        An empty document (no tokens, no lengths) still counts as one.
        """
        self.add_documents(
            np.asarray(tokens), np.asarray(lengths, np.int64), np.array([len(lengths)])
        )

    def add_documents(
        self, tokens: Tokens, lengths: Tokens, sequences: npt.NDArray[np.integer[Any]]
    ) -> None:
        """Several documents at once; ``sequences`` [documents] counts each one's sequences."""
        check_documents(tokens, lengths, sequences, self.prefix)
        if tokens.dtype != self.dtype:
            self._check_range(tokens)
        self._stream.write(np.ascontiguousarray(tokens, self.dtype).tobytes())
        before = len(self._lengths)
        self._lengths.frombytes(lengths.astype(np.intc).tobytes())
        self._boundaries.frombytes((np.cumsum(sequences, dtype=np.int64) + before).tobytes())
        self.num_tokens += len(tokens)

    def _check_range(self, tokens: Tokens) -> None:
        if len(tokens) and self.dtype.kind in "iu":
            bounds = np.iinfo(self.dtype)
            if not bounds.min <= int(tokens.min()) <= int(tokens.max()) <= bounds.max:
                raise DataError(
                    f"{self.prefix}: token ids {int(tokens.min())}..{int(tokens.max())} do not "
                    f"fit {self.dtype.name}; the tokenizer's vocab_size is too small for its ids."
                )

    def append(self, prefix: str | Path) -> None:
        """All documents of another dataset. Raises DataError if its dtype differs."""
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            raise DataError(
                f"{idx_path(prefix)} holds {other.dtype.name} tokens, {self.prefix} is written as "
                f"{self.dtype.name}; datasets of different dtypes cannot be merged."
            )
        before = len(self._lengths)
        for start in range(0, len(other.sizes), _BLOCK):
            self._lengths.frombytes(other.sizes[start : start + _BLOCK].astype(np.intc).tobytes())
        for start in range(1, len(other.document_indices), _BLOCK):
            block = other.document_indices[start : start + _BLOCK].astype(np.int64) + before
            self._boundaries.frombytes(block.tobytes())
        with bin_path(prefix).open("rb") as stream:
            shutil.copyfileobj(stream, self._stream, 1 << 22)
        self.num_tokens += other.num_tokens

    def finalize(self) -> None:
        """Write the index; the pair can be opened afterwards."""
        self._stream.close()
        boundaries = np.diff(np.frombuffer(self._boundaries, np.int64))
        write_index(self.prefix, self.dtype, [np.frombuffer(self._lengths, np.intc)], [boundaries])


def check_documents(
    tokens: Tokens, lengths: Tokens, sequences: npt.NDArray[np.integer[Any]], where: Path
) -> None:
    """Raises ValueError if the numbers do not fit each other, DataError for a sequence that the
    format cannot hold."""
    if int(lengths.sum()) != len(tokens) or int(sequences.sum()) != len(lengths):
        raise ValueError(
            f"{len(tokens)} tokens, lengths adding up to {int(lengths.sum())}; "
            f"{len(lengths)} sequences, documents adding up to {int(sequences.sum())}"
        )
    if len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= _LONGEST:
        raise DataError(
            f"{where}: a sequence of {int(lengths.max()):,} tokens is longer than the "
            f"{_LONGEST:,} that .idx can record. Cut that document into several."
        )


def write_index(
    prefix: Path, dtype: np.dtype[Any], lengths: Sequence[Tokens], sequences: Sequence[Tokens]
) -> None:
    """``P.idx`` from consecutive pieces: lengths of sequences, sequences of each document."""
    codes = {np.dtype(name): code for code, name in DTYPES}
    count, documents = sum(map(len, lengths)), sum(map(len, sequences))
    with idx_path(prefix).open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, codes[dtype], count, documents + 1))
        for block in _blocks(lengths):
            stream.write(block.astype("<i4").data)
        end = 0
        for block in _blocks(lengths):
            ends = np.cumsum(block, dtype=np.int64) + end
            stream.write(((ends - block) * dtype.itemsize).astype("<i8").data)
            end = int(ends[-1])
        stream.write(np.zeros(1, "<i8").data)
        end = 0
        for block in _blocks(sequences):
            ends = np.cumsum(block, dtype=np.int64) + end
            stream.write(ends.astype("<i8").data)
            end = int(ends[-1])


def _blocks(pieces: Sequence[Tokens]) -> Iterator[Tokens]:
    for piece in pieces:
        for start in range(0, len(piece), _BLOCK):
            yield np.asarray(piece[start : start + _BLOCK])


def merge_datasets(prefixes: Sequence[str | Path], output: str | Path) -> None:
    """Concatenate datasets of one dtype, in the given order, into the pair ``output``."""
    with IndexedDatasetWriter(output, IndexedDataset(prefixes[0]).dtype) as writer:
        for prefix in prefixes:
            writer.append(prefix)
