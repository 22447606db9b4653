"""What :class:`serving.torch_engine.TorchEngine` has in hand."""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import dataclass, field

from serving import beam
from serving.engine import Health, Ticket
from serving.generation import Decoder


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
class Asked:
    """A question whether tokens are decoded, and its answer."""

    done: threading.Event = field(default_factory=threading.Event)
    health: Health = Health(False, "the engine did not answer")

    def answer(self, health: Health) -> None:
        self.health = health
        self.done.set()


@dataclass
class BeamSearch:
    job: Job
    decoder: Decoder
    steps: Generator[None, None, list[beam.Hypothesis]]
