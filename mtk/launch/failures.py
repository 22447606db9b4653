"""What went wrong in a rank, carried to the process that started it, and who was to blame."""

from __future__ import annotations

import errno
import pickle
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from mtk.errors import ArtifactError, Interrupted, MtkError

# What backends say when the other side went away or did not come.
_PEER_WORDS = (
    "gloo/transport",
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out",
    "timeout",
    "nccl",
)
# A file or folder that the user can do something about.
_DISK = frozenset(
    getattr(errno, name)
    for name in (
        "ENOSPC",
        "EDQUOT",
        "EROFS",
        "EACCES",
        "EPERM",
        "EFBIG",
        "ENOENT",
        "ENOTDIR",
        "EISDIR",
    )
)
OUT_OF_MEMORY = (
    "There is not enough memory for these sizes on this rank: lower --micro-batch-size or "
    "--seq-length, recompute (--recompute-activations), or use more ranks."
)


@dataclass(frozen=True)
class Failure:
    """An exception of a rank as plain data.

    kind: ``mtk`` an error for users, ``interrupted`` a stop on request, ``peer`` another rank
    went away or did not come, ``error`` anything else. pickled: the MtkError itself.
    """

    kind: Literal["mtk", "interrupted", "peer", "error"]
    text: str
    traceback: str
    pickled: bytes | None = None

    def error(self) -> MtkError | None:
        """The MtkError to raise again; None for the other kinds."""
        if self.pickled is None:
            return None
        error = pickle.loads(self.pickled)
        return error if isinstance(error, MtkError) else None


def describe(error: BaseException) -> Failure:
    """``error`` as data."""
    text = f"{type(error).__name__}: {error}".strip().rstrip(":")
    trace = "".join(traceback.format_exception(error)).rstrip()
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted("stopped by Ctrl-C; the same command continues from the last save.")
    if isinstance(error, OSError) and error.errno in _DISK:
        # As the program reports it when it runs alone.
        where = f"{error.filename}: " if error.filename else ""
        error = ArtifactError(f"{where}{error.strerror or error}.")
    if isinstance(error, MtkError):
        kind: Literal["mtk", "interrupted"] = (
            "interrupted" if isinstance(error, Interrupted) else "mtk"
        )
        return Failure(kind, text, trace, _pickled(error))
    if _out_of_memory(error):
        return Failure("error", text, f"{trace}\n{OUT_OF_MEMORY}")
    return Failure("peer" if lost_peer(error) else "error", text, trace)


def _pickled(error: MtkError) -> bytes | None:
    """The error without its traceback; where its class cannot be carried, the nearest base."""
    candidates = [error] + [
        base(str(error)) for base in type(error).__mro__ if base.__module__ == MtkError.__module__
    ]
    for candidate in candidates:
        try:
            content = pickle.dumps(candidate)
            pickle.loads(content)
            return content
        except Exception:  # constructors of their own, attributes that cannot be pickled
            continue
    return None


def lost_peer(error: BaseException) -> bool:
    """The backend says that another rank went away or did not come in time."""
    return any(
        isinstance(one, dist.DistError)
        or (type(one) is RuntimeError and any(w in str(one).lower() for w in _PEER_WORDS))
        for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _out_of_memory(error: BaseException) -> bool:
    named = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or named or "can't allocate memory" in str(error)


def describe_status(status: int) -> str:
    """What a wait status of ``os.waitpid`` says, e.g. ``was killed by SIGKILL``."""
    if status >= 0 and (status & 0x7F) == 0:
        return f"ended with exit status {status >> 8} without a result"
    number = status & 0x7F
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    hints = {
        "SIGKILL": "often the kernel's answer to a lack of memory; see dmesg",
        "SIGABRT": "often NCCL's watchdog or a failed check in native code",
        "SIGSEGV": "a crash in native code",
        "SIGBUS": "often a full disk or /dev/shm",
    }
    return f"was killed by {name}" + (f" ({hints[name]})" if name in hints else "")
