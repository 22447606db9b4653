"""Files as read-only arrays: mapped into memory, or read where they are small.

A blend of thousands of datasets opens five files for each. A map of Python's keeps its file open
(before Python 3.13), and systems allow 1,024 open files to begin with, so small files are read
and the limit is raised as far as the system lets a process raise it.
"""

from __future__ import annotations

import errno
import mmap
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtk.errors import DataError

READ_BELOW = 1 << 16  # bytes


def mapped_bytes(path: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a file, read-only. Raises DataError when too many files are open."""
    try:
        return _opened(path)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    _raise_limit()
    try:
        return _opened(path)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise DataError(
            f"{path} cannot be opened: this process has as many files open as it may. Raise the "
            f"limit (ulimit -n 100000), or merge datasets with mtk merge."
        ) from error


def _opened(path: Path) -> npt.NDArray[np.uint8]:
    if path.stat().st_size < READ_BELOW:
        return np.frombuffer(path.read_bytes(), dtype=np.uint8)
    with path.open("rb") as stream:
        # Only newer versions can let the file go.
        options: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        found = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ, **options)
    return np.frombuffer(found, dtype=np.uint8)


def _raise_limit() -> None:
    """Let this process open as many files as the system lets it."""
    if sys.platform == "win32":
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
