"""Sockets that send a byte now and then for ever: what they cost those who behave."""

from __future__ import annotations

import argparse
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tests.serving.load.overload import percentile
from tests.serving.load.server_process import ServerProcess, server_process
from tests.serving.wire import call

SOCKETS, DRIP, TICK = 200, 0.5, 0.002
BODY = {"prompt": "Hello", "max_tokens": 8, "temperature": 0}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-Slow: "


@dataclass(frozen=True)
class Comparison:
    """Seconds that good clients' requests took, without and with the slow ones."""

    alone: list[float]
    beside: list[float]
    statuses: set[int]

    @property
    def ratio(self) -> float:
        return percentile(self.beside, 0.99) / percentile(self.alone, 0.99)


@contextmanager
def slow_sockets(url: str, count: int) -> Iterator[None]:
    """``count`` connections whose headers never end."""
    address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
    sockets = [socket.create_connection(address, 10) for _ in range(count)]
    for each in sockets:
        each.sendall(HEAD)
    ended = threading.Event()

    def drip() -> None:
        while not ended.wait(DRIP):
            for each in sockets:
                with suppress(OSError):
                    each.send(b"a")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for each in sockets:
            each.close()


def good_clients(url: str, seconds: float, clients: int = 4) -> tuple[list[float], set[int]]:
    end = time.monotonic() + seconds
    taken: list[float] = []
    statuses: set[int] = set()

    def work() -> None:
        while time.monotonic() < end:
            began = time.perf_counter()
            statuses.add(call(url, "POST", "/v1/completions", BODY)[0])
            taken.append(time.perf_counter() - began)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken, statuses


def compare(server: ServerProcess, seconds: float, rounds: int, count: int = SOCKETS) -> Comparison:
    """Short windows in turn, so that what else the machine does hits both alike."""
    alone: list[float] = []
    beside: list[float] = []
    seen: set[int] = set()
    good_clients(server.url, 0.5)  # warm
    for _ in range(rounds):
        taken, statuses = good_clients(server.url, seconds / rounds / 2)
        alone += taken
        seen |= statuses
        with slow_sockets(server.url, count):
            taken, statuses = good_clients(server.url, seconds / rounds / 2)
        beside += taken
        seen |= statuses
    return Comparison(alone, beside, seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--sockets", type=int, default=SOCKETS)
    asked = parser.parse_args()
    with server_process(TICK, max_batch_size=8, read_timeout=30.0) as server:
        found = compare(server, asked.seconds, rounds=10, count=asked.sockets)
        for name, taken in (("alone", found.alone), ("beside", found.beside)):
            print(
                f"{name}: {len(taken)} requests, p50 {1000 * percentile(taken, 0.5):.1f} ms, "
                f"p99 {1000 * percentile(taken, 0.99):.1f} ms"
            )
        print(f"p99 beside {asked.sockets} slow sockets / alone: {found.ratio:.2f}")


if __name__ == "__main__":
    main()
