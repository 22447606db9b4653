"""A token dataset that grows by parts: what is finished stays, also after ``kill -9``.

Tokens are appended to one ``.bin`` for good, so that nothing is copied at the end. What belongs
to a finished part is told by the sizes in its facts; whatever lies behind is cut off before the
work goes on. A part keeps its lengths and boundaries as arrays; the ``.idx`` is made of them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mtk.data.indexed_dataset import bin_path, check_documents, write_index
from mtk.errors import ArtifactError

Tokens = npt.NDArray[Any]


class GrowingDataset:
    """The tokens in ``path``; ``size`` bytes of it belong to finished parts.

    Raises ArtifactError if the file is shorter than that.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], size: int) -> None:
        self.path, self.dtype = path, dtype
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._sequences: list[npt.NDArray[np.int32]] = []
        self._stream: BinaryIO = path.open("ab", buffering=1 << 20)
        found = path.stat().st_size
        if found < size:
            self._stream.close()
            raise ArtifactError(
                f"{path} has {found} bytes, its finished parts hold {size}: it was damaged. "
                f"Remove {path.parent}."
            )
        self._stream.truncate(size)

    def add_documents(
        self, tokens: Tokens, lengths: npt.NDArray[np.int64], sequences: npt.NDArray[np.int64]
    ) -> None:
        """Tokens [sum(lengths)], lengths [sum(sequences)], sequences of each document."""
        check_documents(tokens, lengths, sequences, self.path)
        self._stream.write(np.ascontiguousarray(tokens, self.dtype).data)
        self._lengths.append(lengths.astype(np.int32))
        self._sequences.append(sequences.astype(np.int32))

    def finish_part(self, folder: Path, name: str) -> dict[str, int]:
        """Make what was added durable, with its arrays in ``folder``; the facts to keep."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        lengths, sequences = _joined(self._lengths), _joined(self._sequences)
        np.save(folder / f"{name}.lengths.npy", lengths)
        np.save(folder / f"{name}.sequences.npy", sequences)
        self._lengths, self._sequences = [], []
        return {
            "bytes": self._stream.tell(),
            "documents": len(sequences),
            "sequences": len(lengths),
            "tokens": int(lengths.sum(dtype=np.int64)),
        }

    def close(self) -> None:
        self._stream.close()

    def publish(self, prefix: Path, parts: Sequence[Path], name: str) -> None:
        """``prefix``.bin (another name of the same file where the disk can do that) and
        ``prefix``.idx from the arrays in ``parts``."""
        self.close()
        try:
            os.link(self.path, bin_path(prefix))
        except OSError:
            shutil.copyfile(self.path, bin_path(prefix))
        write_index(
            prefix,
            self.dtype,
            [np.load(part / f"{name}.lengths.npy", mmap_mode="r") for part in parts],
            [np.load(part / f"{name}.sequences.npy", mmap_mode="r") for part in parts],
        )


def _joined(arrays: list[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int32)
