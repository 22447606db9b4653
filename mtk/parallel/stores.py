"""Key-value stores where the ranks of a job meet."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

LOOPBACK = "127.0.0.1"


def loopback_store(world: int, timeout: float) -> TCPStore:
    """Hosts a store that only this machine can reach, on a free port (``.port``)."""
    listening = socket.socket()
    listening.bind((LOOPBACK, 0))
    listening.listen(1024)
    port = listening.getsockname()[1]
    return TCPStore(
        LOOPBACK,
        port,
        world,
        True,
        timedelta(seconds=timeout),
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )


def connect(address: tuple[str, int], world: int, timeout: float, prefix: str = "") -> Store:
    """A connection of its own to the store at ``address``; its keys start with ``prefix``."""
    host, port = address
    store: Store = TCPStore(host, port, world, False, timedelta(seconds=timeout))
    return PrefixStore(prefix, store) if prefix else store
