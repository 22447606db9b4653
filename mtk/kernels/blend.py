"""The order of a blend as the plain loop that it is, compiled by numba.

See :mod:`mtk.data.blend_indices` for the rule. Numbers are rounded as there: products and
differences each for themselves, which numba keeps to unless it is told otherwise.
"""

import numpy as np
from numba import njit


@njit(nogil=True)
def pick(weights, limits, picks):
    """Fill ``picks`` int16 [size] with the dataset of every sample.

    weights: float64 [datasets], sum 1. limits: int64 [datasets], samples that each has.
    """
    datasets = len(weights)
    counts = np.zeros(datasets, np.float64)
    for s in range(len(picks)):
        time = np.float64(max(s, 1))
        best, most = 0, -np.inf
        for d in range(datasets):
            lag = weights[d] * time - counts[d]
            if lag > most:
                best, most = d, lag
        picks[s] = best
        counts[best] += 1.0
        if counts[best] >= limits[best]:
            counts[best] = np.inf  # spent: it lags by less than all others
