"""How long a row is held after its client has left.

The server writes down when it freed the rows of a request that was given up, and when its last
steps began; the client knows when it closed its socket. Both read the machine's one monotonic
clock; the request's seed says whose row it was.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Steps whose beginnings are kept.
REMEMBERED = 2000


@dataclass(frozen=True)
class Freed:
    """Of one request: seconds from the closed socket to the freed row, and the steps that began
    in that time."""

    seconds: float
    steps: int

    @property
    def quick(self) -> bool:
        return self.seconds <= 0.25 or self.steps <= 2


def write_down(engine_class: Any, path: str) -> None:
    """Let engines of this process write a line to ``path`` for every row freed early."""
    free, begins = engine_class._drop_abandoned, deque[float](maxlen=REMEMBERED)

    def drop(engine: Any) -> None:
        given_up = {s for s, (job, _) in engine._owners.items() if job.ticket.done}
        free(engine)
        now = time.monotonic()
        with Path(path).open("a") as log:
            for sequence in given_up:
                seed = sequence.request.sampling.seed
                log.write(json.dumps({"seed": seed, "at": now, "steps": list(begins)}) + "\n")
        begins.append(now)

    engine_class._drop_abandoned = drop


def freed(path: Path, closed: dict[int, float]) -> list[Freed]:
    """closed: when each seed's client left. Those whose answer was whole by then are not in it."""
    found = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if entry["seed"] in closed:
            left = closed[entry["seed"]]
            steps = len(entry["steps"]) - bisect_right(entry["steps"], left)
            found.append(Freed(entry["at"] - left, steps))
    return found
