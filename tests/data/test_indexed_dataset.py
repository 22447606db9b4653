"""``.bin``/``.idx``: golden bytes, damage, sizes beyond 32 bits, merging."""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mtk.data.indexed_dataset import (
    HEADER,
    MAGIC,
    IndexedDataset,
    IndexedDatasetWriter,
    bin_path,
    idx_path,
    merge_datasets,
    token_dtype,
)
from mtk.errors import DataError

GOLDEN_MD5 = "84717ac691928be4ab7847ab353c4089"


def write(prefix: Path, documents: list[list[list[int]]], dtype: str = "uint16") -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            flat = [token for sequence in document for token in sequence]
            writer.add_document(np.array(flat, np.int64), [len(s) for s in document])
    return prefix


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return write(tmp_path / "golden", [[[1, 2, 3]], [[4, 5]]])


def test_golden_index(golden: Path) -> None:
    index = idx_path(golden).read_bytes()
    assert len(index) == 82
    assert hashlib.md5(index).hexdigest() == GOLDEN_MD5
    assert bin_path(golden).read_bytes() == struct.pack("<5H", 1, 2, 3, 4, 5)


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_what_is_written_is_read(tmp_path: Path, dtype: str) -> None:
    documents = [[[1, 2], [3]], [], [[4, 5, 6, 7]], [[65_000]]]
    dataset = IndexedDataset(write(tmp_path / "a.b", documents, dtype))
    assert dataset.dtype == np.dtype(dtype)
    assert (len(dataset), dataset.num_documents, dataset.num_tokens) == (4, 4, 8)
    assert dataset.sizes.dtype == np.int32
    assert dataset.document_indices.dtype == np.int64
    assert dataset.document_indices.tolist() == [0, 2, 2, 3, 4]
    flat = [sequence for document in documents for sequence in document]
    assert [dataset[i].tolist() for i in range(4)] == flat
    assert dataset.get(2, 1, 2).tolist() == [5, 6]
    assert dataset.get(2, 4).tolist() == []
    assert dataset.get(-1).tolist() == [65_000]
    assert not dataset[0].flags.writeable


@pytest.mark.parametrize("arguments", [(4,), (0, -1), (0, 0, 3), (2, 5), (2, 0, -1)])
def test_outside_is_an_index_error(tmp_path: Path, arguments: tuple[int, ...]) -> None:
    dataset = IndexedDataset(write(tmp_path / "a", [[[1, 2]], [[3]], [[4, 5, 6, 7]], [[8]]]))
    with pytest.raises(IndexError):
        dataset.get(*arguments)


def test_no_sequences(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "a", [[], []]))
    assert (len(dataset), dataset.num_documents, dataset.num_tokens) == (0, 2, 0)


def test_pickles_by_path(golden: Path) -> None:
    data = pickle.dumps(IndexedDataset(golden))
    assert len(data) < 500
    assert pickle.loads(data)[1].tolist() == [4, 5]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(1, "<u2"), (65_499, "<u2"), (65_500, "<i4"), (128_256, "<i4")]
)
def test_dtype_by_vocabulary(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)


def edit(suffix: str, change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def apply(prefix: Path) -> None:
        path = Path(f"{prefix}.{suffix}")
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)

    return apply


def put(offset: int, layout: str, value: int) -> Callable[[bytearray], object]:
    return lambda data: struct.pack_into(layout, data, offset, value)


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no bin": (lambda p: bin_path(p).unlink(), [".bin", "does not exist"]),
    "no idx": (lambda p: idx_path(p).unlink(), [".idx", "does not exist"]),
    "empty idx": (edit("idx", bytearray.clear), [".idx", "b''"]),
    "magic": (edit("idx", put(0, "<B", 0)), ["not a Megatron index", "MMIDIDX"]),
    "header cut": (edit("idx", lambda d: d.__delitem__(slice(20, None))), ["20 bytes", "34"]),
    "version": (edit("idx", put(9, "<Q", 2)), ["version 2", "expected 1"]),
    "dtype code": (edit("idx", put(17, "<B", 9)), ["dtype code 9"]),
    "count": (edit("idx", put(18, "<Q", 3)), ["82 bytes", "expected 94", "truncated"]),
    "huge count": (edit("idx", put(18, "<Q", 2**63)), ["truncated"]),
    "idx short": (edit("idx", lambda d: d.pop()), ["81 bytes", "expected 82", "truncated"]),
    "idx long": (edit("idx", lambda d: d.append(0)), ["83 bytes", "expected 82", "overlong"]),
    "multimodal": (edit("idx", lambda d: d.extend(b"\0\0")), ["modes"]),
    "bin short": (edit("bin", lambda d: d.pop()), ["9 bytes", "expected 10"]),
    "bin long": (edit("bin", lambda d: d.append(0)), ["11 bytes", "expected 10"]),
    "EOD not counted": (edit("bin", lambda d: d.extend(b"\0\0")), ["12 bytes", "EOD"]),
    "length": (edit("idx", put(34, "<i", 2)), ["sequence 1", "byte 6", "expected 4"]),
    "last length": (edit("idx", put(38, "<i", 3)), ["10 bytes", "expected 12"]),
    "negative": (edit("idx", put(34, "<i", -1)), ["sequence 0", "-1"]),
    "pointer": (edit("idx", put(50, "<q", 4)), ["sequence 1", "byte 4", "expected 6"]),
    "first boundary": (edit("idx", put(58, "<q", 1)), ["(1, 2)", "(0, 2)"]),
    "last boundary": (edit("idx", put(74, "<q", 1)), ["(0, 1)"]),
    "boundary order": (edit("idx", put(66, "<q", 3)), ["boundary 2"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_at_opening(golden: Path, name: str) -> None:
    apply, words = DAMAGE[name]
    apply(golden)
    with pytest.raises(DataError) as caught:
        IndexedDataset(golden)
    assert str(golden) in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


def test_every_flipped_byte_of_the_index_is_noticed(golden: Path) -> None:
    original = idx_path(golden).read_bytes()
    silent = []
    for position in range(len(original)):
        data = bytearray(original)
        data[position] ^= 1
        idx_path(golden).write_bytes(data)
        try:
            IndexedDataset(golden)
        except DataError:
            continue
        silent.append(position)
    # Only which document a sequence belongs to cannot be told from the rest (byte 66).
    assert silent == [66]


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_a_file_cut_at_any_byte_is_refused(golden: Path, suffix: str) -> None:
    path = Path(f"{golden}.{suffix}")
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=str(path)):
            IndexedDataset(golden)


def test_beyond_32_bits(tmp_path: Path) -> None:
    prefix = tmp_path / "huge"
    lengths, tail = [2**31 - 1, 2**31 - 1, 3], 2**32 + 1
    with IndexedDatasetWriter(prefix, "int32") as writer:
        writer._lengths.extend(lengths)
        writer._boundaries.extend([1, 3])
    with bin_path(prefix).open("r+b") as stream:  # sparse: 17 GB that take no room
        stream.truncate(tail * 4)
        stream.seek((tail - 3) * 4)
        stream.write(struct.pack("<3i", 7, 8, 9))
    dataset = IndexedDataset(prefix)
    assert dataset.num_tokens == tail
    assert dataset.pointers.tolist() == [0, (2**31 - 1) * 4, (2**32 - 2) * 4]
    assert dataset[2].tolist() == [7, 8, 9]
    assert dataset.get(1, 2**31 - 2).tolist() == [0]
    with bin_path(prefix).open("r+b") as stream:
        stream.truncate(tail * 4 - 1)
    with pytest.raises(DataError, match="truncated"):
        IndexedDataset(prefix)


def test_merge_is_writing_all_at_once(tmp_path: Path) -> None:
    one, two = [[[1, 2], [3]], []], [[], [[4]], [[5, 6]]]
    parts = [write(tmp_path / "a", one), write(tmp_path / "b", two)]
    merge_datasets(parts, tmp_path / "merged")
    write(tmp_path / "whole", one + two)
    for suffix in ("bin", "idx"):
        merged = (tmp_path / f"merged.{suffix}").read_bytes()
        assert merged == (tmp_path / f"whole.{suffix}").read_bytes()


def test_merge_refuses_another_dtype(tmp_path: Path) -> None:
    parts = [write(tmp_path / "a", [[[1]]]), write(tmp_path / "b", [[[1]]], "int32")]
    with pytest.raises(DataError, match="int32 tokens"):
        merge_datasets(parts, tmp_path / "merged")
    assert not (tmp_path / "merged.bin").exists()


def test_writer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
        with pytest.raises(DataError, match="70000"):
            writer.add_document([70_000], [1])
        with pytest.raises(DataError, match="-1"):
            writer.add_document([-1], [1])
        with pytest.raises(ValueError, match="adding up"):
            writer.add_document([1, 2], [1])
        writer.add_document([], [])
    assert IndexedDataset(tmp_path / "a").num_documents == 1
    with pytest.raises(ValueError, match="no code"):
        IndexedDatasetWriter(tmp_path / "b", "complex64")


def test_a_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
        writer.add_document([1], [1])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_header_constants() -> None:
    assert HEADER.size == 34
    assert MAGIC == b"MMIDIDX\x00\x00"
