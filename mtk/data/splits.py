"""Shares of a dataset for training, validation and test, as Megatron-core divides them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal, get_args

import numpy as np

from mtk.errors import ConfigError, DataError, Problem

SplitName = Literal["train", "valid", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
Bounds = tuple[float, float]


def parse_split(text: str) -> tuple[Bounds | None, ...]:
    """Begin and end of each split as fractions of the dataset; None where the share is zero.

    Every run of digits and dots is a number, so ``969,30,1``, ``969/30/1`` and ``969 30 1``
    are the same. Missing shares are 0, and all are divided by their sum in float64.
    Raises ConfigError for more than three shares, none above zero, or what is no number.
    """
    weights = _weights(text)
    total = float(np.sum(np.array(weights, dtype=np.float64)))
    ends = list(accumulate((weight / total for weight in weights), initial=0.0))
    return tuple((begin, end) if end > begin else None for begin, end in pairwise(ends))


def split_ranges(text: str, count: int) -> tuple[range | None, ...]:
    """What each split takes of a dataset of ``count`` sequences (or documents).

    Bounds are rounded half to even. A share above zero may still round to an empty range;
    :func:`require_units` turns that into an error.
    """
    return tuple(None if b is None else _elements(b, count) for b in parse_split(text))


def require_units(
    part: range, split: SplitName, text: str, count: int, where: str, unit: str = "sequences"
) -> None:
    """Raise DataError if a split that is asked for holds nothing.

    unit: what is divided, in the plural.
    """
    if len(part):
        return
    found = f"{where}: the {split} split of --split {text} is empty"
    smallest = smallest_share(text, split, count)
    if smallest is None:
        raise DataError(
            f"{found}: {count} {unit} are too few to divide. Use more data, or give every split "
            f"its own dataset with --train-data-path, --valid-data-path and --test-data-path."
        )
    raise DataError(
        f"{found}: its share of {count} {unit} rounds to none. A share of {smallest.share:.3g} "
        f"of the whole gives one {unit[:-1]}: --split {smallest.text}, or use more data."
    )


class SmallestShare:
    """The least share that gives a split one sequence.

    share: as a fraction of the whole; text: a ``--split`` value that has it.
    """

    def __init__(self, share: float, text: str) -> None:
        self.share = share
        self.text = text


def smallest_share(text: str, split: SplitName, count: int) -> SmallestShare | None:
    """The least share of ``split`` (taken from the largest other one) that is not empty.

    None if no share would do without emptying the split that it is taken from.
    """
    weights = _weights(text)
    wanted = SPLITS.index(split)
    donor = max((i for i in range(3) if i != wanted), key=lambda i: weights[i])
    scale = 10 ** max(3, math.ceil(math.log10(max(count, 1))) + 2)
    total = sum(weights)
    units = [round(weight / total * scale) for weight in weights]

    def shifted(extra: int) -> list[int]:
        moved = list(units)
        moved[wanted] += extra
        moved[donor] -= extra
        return moved

    def filled(extra: int) -> bool:
        part = split_ranges(_join(shifted(extra)), count)[wanted]
        return part is not None and len(part) > 0

    low, high = 0, units[donor]
    if not high or not filled(high):
        return None
    # Larger shares only ever widen the range: bisection finds the first that is not empty.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if filled(middle) else (middle, high)
    found = shifted(high)
    rest = split_ranges(_join(found), count)[donor]
    if rest is None or not len(rest):
        return None
    return SmallestShare(found[wanted] / sum(found), _join(found))


def _join(units: Sequence[int]) -> str:
    common = math.gcd(*units)
    return ",".join(str(unit // common) for unit in units)


def _elements(bounds: Bounds, count: int) -> range:
    begin, end = bounds
    return range(round(begin * float(count)), round(end * float(count)))


def _weights(text: str) -> list[float]:
    # Megatron-core reads every run of digits and passes over the rest, so that a typo
    # such as "nan" or a minus sign would change the shares silently; here it is refused.
    known = re.fullmatch(r"[\s,/;()\[\].0-9]*", text)
    try:
        weights = [float(number) for number in re.findall(r"[.0-9]+", text)] if known else []
    except ValueError:
        weights = []
    if not 1 <= len(weights) <= len(SPLITS) or not sum(weights) > 0:
        rule = "must be up to three numbers (training, validation, test), not all zero"
        raise ConfigError([Problem("data.split", text, rule, "Example: 969,30,1.")])
    return weights + [0.0] * (len(SPLITS) - len(weights))
