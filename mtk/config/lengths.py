"""Distributions of lengths, as benchmarks of serving take them on the command line."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["fixed", "uniform", "normal", "lognormal"]
FORMS = "128, 64-256, normal:128:32 (mean, deviation) or lognormal:128:0.6 (median, sigma)"


@dataclass(frozen=True)
class Lengths:
    """first, second: length; lowest and highest; mean and standard deviation; median and the
    standard deviation of the logarithm."""

    kind: Kind
    first: float
    second: float = 0.0

    def draw(self, source: random.Random, most: int) -> int:
        """A length of 1 .. most tokens; what is drawn beyond is cut to the nearest."""
        if self.kind == "uniform":
            drawn = float(source.randint(int(self.first), int(self.second)))
        elif self.kind == "normal":
            drawn = source.gauss(self.first, self.second)
        elif self.kind == "lognormal":
            drawn = source.lognormvariate(math.log(self.first), self.second)
        else:
            drawn = self.first
        return max(1, min(most, round(drawn)))

    @property
    def typical(self) -> int:
        """The middle of the distribution."""
        middle = (self.first + self.second) / 2 if self.kind == "uniform" else self.first
        return max(1, round(middle))


def parse_lengths(text: str) -> Lengths:
    """Raises ValueError for what is none of :data:`FORMS`."""
    kind, _, rest = text.partition(":")
    if rest and kind in ("normal", "lognormal"):
        first, second = (float(part) for part in rest.split(":"))
        found = Lengths("normal" if kind == "normal" else "lognormal", first, second)
    elif "-" in text:
        low, high = (int(part) for part in text.split("-"))
        found = Lengths("uniform", low, high)
        if high < low:
            raise ValueError(text)
    else:
        found = Lengths("fixed", int(text))
    if not (1 <= found.first < math.inf and 0 <= found.second < math.inf):
        raise ValueError(text)
    return found
