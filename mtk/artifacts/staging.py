"""Staging folders: where outputs grow until one rename publishes them.

The name of a staging folder tells host and process, so that what a killed process left
is recognised and removed, also where several machines share the disk.
"""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path


def staging_prefix(name: str) -> str:
    """Beginning of a hidden folder name for the output ``name`` of this process."""
    return f".{name}.partial-{_host()}-{os.getpid()}-"


def remove_leftovers(parent: Path, name: str = "*") -> None:
    """Delete the staging folders in ``parent`` of processes of this machine that died.

    name: of the output they were for; a glob pattern.
    """
    for folder in parent.glob(f".{name}.partial-{_host()}-*"):
        pid = folder.name.rpartition(f".partial-{_host()}-")[2].split("-")[0]
        if pid.isdigit() and int(pid) != os.getpid() and not process_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _host() -> str:
    return "".join(c if c.isalnum() else "_" for c in socket.gethostname())


def process_exists(pid: int) -> bool:
    """Whether this machine runs a process with this id, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
