"""What the torch engine has in hand: requests, searches, questions for its health."""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import dataclass, field

from serving import beam
from serving.engine import Health, Ticket


@dataclass
class Job:
    """A ticket and how many of its sequences have begun."""

    ticket: Ticket
    begun: int = 0

    @property
    def exhausted(self) -> bool:
        beams = self.ticket.request.beam is not None
        return self.begun >= (1 if beams else self.ticket.request.sequences)


@dataclass
class Probe:
    """A question for health, and its answer once ``done``."""

    done: threading.Event = field(default_factory=threading.Event)
    health: Health = Health(False, "the engine did not answer")

    def answer(self, health: Health) -> None:
        self.health = health
        self.done.set()


@dataclass
class BeamSearch:
    """A search that runs, a step at a time."""

    job: Job
    steps: Generator[None, None, list[beam.Hypothesis]]
