"""Samples per step while the batch grows to its full size, as in Megatron-LM."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSchedule:
    """full: samples per step in the end. rampup: (START, INCREMENT, SAMPLES): begin with START
    and add INCREMENT at even distances, so that ``full`` is reached after SAMPLES.

    Raises ValueError where the increments do not lead from START to ``full``.
    """

    full: int
    rampup: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.full < 1:
            raise ValueError(f"batch size {self.full}")
        if self.rampup is None:
            return
        start, increment, samples = self.rampup
        if min(self.rampup) < 1 or start > self.full or (self.full - start) % increment:
            raise ValueError(f"ramp-up {start} {increment} {samples} does not lead to {self.full}")

    def at(self, consumed: int) -> int:
        """Samples of the step that begins after ``consumed`` samples."""
        if self.rampup is None:
            return self.full
        start, increment, samples = self.rampup
        increments = (self.full - start) // increment
        if consumed > samples or not increments:
            return self.full
        return min(self.full, start + int(consumed / (samples / increments)) * increment)

    def steps(self, samples: int) -> int:
        """Whole steps that ``samples`` suffice for; a last partial batch is dropped."""
        steps, consumed = 0, 0
        while consumed <= self._ramp_end and consumed + self.at(consumed) <= samples:
            consumed += self.at(consumed)
            steps += 1
        if consumed > self._ramp_end:
            steps += (samples - consumed) // self.full
        return steps

    def consumed(self, steps: int) -> int:
        """Samples consumed after ``steps`` steps."""
        done, consumed = 0, 0
        while done < steps and consumed <= self._ramp_end:
            consumed += self.at(consumed)
            done += 1
        return consumed + (steps - done) * self.full

    @property
    def _ramp_end(self) -> int:
        return -1 if self.rampup is None else self.rampup[2]
