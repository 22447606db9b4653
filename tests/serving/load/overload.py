"""Ten times more requests than the server can do: refusals are quick, and it recovers at once."""

from __future__ import annotations

import argparse
import threading
import time
from dataclasses import dataclass, field
from queue import SimpleQueue

from tests.serving.load.server_process import ServerProcess, server_process
from tests.serving.wire import call

# With these, 4 rows of 20 tokens at 10 ms a step: 20 requests a second.
TICK, TOKENS, ROWS = 0.01, 20, 4
LIMITS = {"max_batch_size": ROWS, "max_queue": 2, "max_concurrency": ROWS + 2}
CAPACITY = ROWS / (TICK * TOKENS)
BODY = {"prompt": "Hello", "max_tokens": TOKENS, "temperature": 0, "logit_bias": {"256": -100}}


@dataclass
class Overload:
    """Seconds that answers took, by their kind. recovery: seconds until a request was taken
    again after the flood."""

    refused: list[float] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)
    other: list[int] = field(default_factory=list)
    without_hint: int = 0
    recovery: float = float("inf")

    @property
    def refusal_p99(self) -> float:
        return percentile(self.refused, 0.99)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def overload(server: ServerProcess, seconds: float, factor: float = 10.0) -> Overload:
    """Requests arrive at fixed times, whatever becomes of those before."""
    found, due = Overload(), SimpleQueue[float | None]()

    def work() -> None:
        while (at := due.get()) is not None:
            time.sleep(max(0.0, at - time.monotonic()))
            began = time.perf_counter()
            status, _, headers = call(server.url, "POST", "/v1/completions", BODY)
            took = time.perf_counter() - began
            if status == 429:
                found.refused.append(took)
                found.without_hint += "retry-after" not in headers
            elif status == 200:
                found.answered.append(took)
            else:
                found.other.append(status)

    rate = factor * CAPACITY
    start = time.monotonic() + 0.2
    for number in range(int(rate * seconds)):
        due.put(start + number / rate)
    threads = [threading.Thread(target=work) for _ in range(LIMITS["max_concurrency"] + 10)]
    for thread in threads:
        due.put(None)
        thread.start()
    for thread in threads:
        thread.join()
    flood_ended = time.monotonic()
    while call(server.url, "POST", "/v1/completions", BODY)[0] != 200:
        time.sleep(0.02)
    found.recovery = time.monotonic() - flood_ended
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--own-process", action="store_true", help="the engine has one")
    asked = parser.parse_args()
    with server_process(TICK, own_process=asked.own_process, **LIMITS) as server:
        found = overload(server, asked.seconds, asked.factor)
        print(
            f"{len(found.refused)} refused with 429, p50 "
            f"{1000 * percentile(found.refused, 0.5):.1f} ms, p99 "
            f"{1000 * found.refusal_p99:.1f} ms, {found.without_hint} without Retry-After; "
            f"{len(found.answered)} answered, p99 "
            f"{1000 * percentile(found.answered, 0.99):.0f} ms; other {found.other}; recovery "
            f"{found.recovery:.2f} s; held: {server.leaks() or 'nothing'}"
        )


if __name__ == "__main__":
    main()
