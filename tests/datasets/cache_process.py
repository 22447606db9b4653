"""A process that asks for an index, for the tests of concurrent and killed builders.

Arguments: folder, file to wait for ("" for none), number of the fsync or rename call at which
the process kills itself (0: never), "nolock" to run as on a file system without locks.
Prints the SHA-256 of what it got and what it was told.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from mtk.data.index_cache import IndexCache

ITEMS = 300_000


def build() -> dict[str, np.ndarray]:
    return {
        "document": np.arange(ITEMS, dtype=np.int32),
        "shuffle": np.random.RandomState(5).permutation(ITEMS),
        "empty": np.zeros(0, dtype=np.int64),
    }


def digest(arrays: dict[str, Any]) -> str:
    sha = hashlib.sha256()
    for name in sorted(arrays):
        sha.update(name.encode() + arrays[name].tobytes())
    return sha.hexdigest()


def die_at(call: int) -> None:
    """Replace the calls that make a publication durable by ones that count."""
    done = 0
    real_sync, real_rename = os.fsync, Path.rename

    def counted() -> None:
        nonlocal done
        done += 1
        if done == call:
            os.kill(os.getpid(), signal.SIGKILL)

    def fsync(descriptor: int) -> None:
        counted()
        real_sync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        counted()
        return real_rename(self, target)

    os.fsync = fsync
    Path.rename = rename  # type: ignore[method-assign,assignment]


def no_lock(*_: object) -> None:
    raise OSError("no locks here")


def main() -> None:
    folder, gate, call, lock = sys.argv[1:]
    if int(call):
        die_at(int(call))
    if lock == "nolock":
        fcntl.flock = no_lock  # type: ignore[assignment]
    print("ready", flush=True)
    while gate and not Path(gate).exists():
        time.sleep(0.001)
    told: list[str] = []
    arrays = IndexCache(Path(folder), notify=told.append).load_or_build("test", {"a": 1}, build)
    print(json.dumps({"digest": digest(arrays), "told": told}))


if __name__ == "__main__":
    main()
