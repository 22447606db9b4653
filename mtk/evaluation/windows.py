"""Windows over one long sequence, in which every target is scored once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mtk.config.model import ModelConfig
from mtk.errors import ConfigError, Problem


@dataclass(frozen=True)
class Window:
    """Tokens ``start .. start + length`` (one more than it has predictions).

    Predictions ``first .. length - 1`` are scored, earlier ones only give context.
    """

    start: int
    length: int
    first: int

    @property
    def scored(self) -> int:
        return self.length - self.first


def context_length(asked: int | None, model: ModelConfig, usual: int) -> int:
    """Tokens of a window: ``asked``, or else ``usual``. Raises ConfigError for more than the
    model has positions for."""
    limit = model.positions
    if asked is not None and asked > limit and model.positions_are_limited:
        rule = f"exceeds the {limit} positions of the model"
        raise ConfigError([Problem("seq_length", asked, rule, f"Nearest: {limit}.")])
    return asked or usual


def windows(targets: int, length: int, overlap: int | None) -> Iterator[Window]:
    """Windows over ``targets`` predictions, each of at most ``length``.

    overlap: predictions newly scored by every window after the first (Megatron's
    ``--overlapping-eval``); None: windows do not overlap. Window i starts at i x overlap.
    Megatron's trailing windows, in which nothing is scored, are left out.
    """
    step = length if overlap is None else min(max(1, overlap), length)
    done, index = 0, 0
    while done < targets:
        start = index * step
        size = min(length, targets - start)
        yield Window(start, size, done - start)
        done, index = start + size, index + 1


def rolling(targets: int, length: int) -> Iterator[Window]:
    """Windows as lm-evaluation-harness cuts them: one behind the other, but the last reaches
    back so that it has ``length`` predictions too, of which the rest are scored."""
    done = 0
    while done < targets:
        end = min(done + length, targets)
        start = max(0, end - length)
        yield Window(start, end - start, done - start)
        done = end
