"""Key-value stores where the ranks of a job meet."""

from __future__ import annotations

import socket
from datetime import timedelta
from time import monotonic, sleep
from uuid import uuid4

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


def connect(
    address: tuple[str, int], world: int, timeout: float, *, host: bool = False, prefix: str = ""
) -> Store:
    """A connection to the store at ``address``, which this process hosts if ``host``; its keys
    start with ``prefix``. Raises torch's DistError when nobody answers within ``timeout`` s."""
    name, port = address
    store: Store = TCPStore(
        name, port, world, host, timedelta(seconds=timeout), wait_for_workers=False
    )
    return PrefixStore(prefix, store) if prefix else store


def meet(store: Store, rank: int, world: int, timeout: float) -> str:
    """Wait until all ranks are there; returns a prefix for the keys of this meeting.

    torchrun's store outlives its workers. After a restart the addresses of dead ranks are
    still in it, and gloo would connect to those; the number of restarts differs between nodes.
    So rank 0 chooses a name and hands it to ranks that show a word nobody used before.
    Raises TimeoutError that names the ranks that did not come within ``timeout`` seconds.
    """
    if rank:
        word = uuid4().hex
        store.set(f"mtk/hello/{rank}", word)
        store.wait([f"mtk/welcome/{word}"], timedelta(seconds=timeout))
        name = store.get(f"mtk/welcome/{word}").decode()
        store.set(f"mtk/here/{name}/{rank}", "")
        return f"mtk/{name}"
    name, absent = uuid4().hex, set(range(1, world))
    deadline = monotonic() + timeout
    while absent:
        for other in sorted(absent):
            if store.check([f"mtk/here/{name}/{other}"]):
                absent.discard(other)
            elif store.check([f"mtk/hello/{other}"]):
                word = store.get(f"mtk/hello/{other}").decode()
                store.set(f"mtk/welcome/{word}", name)
        if absent and monotonic() > deadline:
            shown = ", ".join(map(str, sorted(absent)[:16])) + (", ..." if len(absent) > 16 else "")
            raise TimeoutError(f"{len(absent)} of {world} ranks did not come: {shown}")
        sleep(0.02 if absent else 0)
    return f"mtk/{name}"
