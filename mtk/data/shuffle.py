"""``numpy.random.RandomState.shuffle``, number for number, in a fraction of its time.

numpy draws a number and then waits for memory at the place it names, one after the other. With
the package numba (``pip install 'mtk[fast]'``) long arrays take
:mod:`mtk.kernels.shuffle`, which draws many numbers before it exchanges anything, so that the
processor waits for many places at once. Without numba numpy does it: the result is the same.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

# Compiling takes about a second, as long as numpy needs for so many numbers.
COMPILED_FROM = 20_000_000
# Beyond, numpy draws numbers of 64 bits.
LONGEST = 1 << 32


def shuffle_in_place(
    values: npt.NDArray[np.integer], state: np.random.RandomState, least: int = COMPILED_FROM
) -> None:
    """Shuffle as ``state.shuffle(values)`` does, and leave ``state`` as that would.

    least: from how many numbers on the compiled loop is used, if numba is there.
    """
    if not least <= len(values) <= LONGEST or not numba_exists():
        state.shuffle(values)
        return
    found: Any = state.get_state(legacy=False)
    key = found["state"]["key"].copy()
    position = int(_compiled()(values, key, found["state"]["pos"]))
    state.set_state({**found, "state": {"key": key, "pos": position}})


def numba_exists() -> bool:
    """Whether numba is installed."""
    return find_spec("numba") is not None


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from mtk.kernels.shuffle import shuffle

    return shuffle
