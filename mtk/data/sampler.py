"""Which samples a step takes, as a pure function of how many were consumed before it.

The cursor of the data is one number, the samples consumed so far. The samples of a step are
the next ``global_batch`` of the dataset's order; data-parallel ranks share them out. How many
ranks there are thus changes who computes a sample but never which step it belongs to, and a
run continues at any point on any number of ranks without replaying or skipping anything.

Legend of shapes: M micro-batches, B samples of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from mtk.errors import ConfigError, Problem


def batch_indices(
    consumed: int, global_batch: int, micro_batch: int, rank: int = 0, world: int = 1
) -> npt.NDArray[np.int64]:
    """Positions [M, B] in the dataset's order for one step of one data-parallel rank.

    Micro-batch ``m`` of rank ``r`` is part ``m * world + r`` of the global batch cut into
    parts of ``micro_batch`` (as Megatron-LM's single-epoch sampler deals them out).
    Raises ConfigError if the parts do not come out even.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}")
    unit = micro_batch * world
    if global_batch < 1 or global_batch % unit:
        rule = f"must be a multiple of micro_batch_size x data-parallel ranks = {unit}"
        nearest = max(1, round(global_batch / unit)) * unit
        raise ConfigError(
            [Problem("batch.global_batch_size", global_batch, rule, f"Nearest: {nearest}.")]
        )
    step = np.arange(consumed, consumed + global_batch, dtype=np.int64)
    return step.reshape(-1, world, micro_batch)[:, rank]


def micro_batches(
    start: int,
    stop: int,
    batch_size_at: Callable[[int], int],
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[npt.NDArray[np.int64]]:
    """Positions [B] of all micro-batches of a rank from ``start`` to ``stop`` consumed samples.

    batch_size_at: global batch after so many consumed samples. A last step that would go past
    ``stop`` is left out.
    """
    consumed = start
    while (size := batch_size_at(consumed)) <= stop - consumed:
        yield from batch_indices(consumed, size, micro_batch, rank, world)
        consumed += size
