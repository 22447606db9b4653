"""Training stages on one process or many ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mtk.artifacts import Artifact
from mtk.config.pretrain import PretrainConfig
from mtk.errors import LayoutError, Problem
from mtk.launch.local import launch
from mtk.launch.process import Place, find_place
from mtk.parallel.apply import training_device
from mtk.parallel.compat import fitting_warnings
from mtk.parallel.ranks import Ranks
from mtk.session import Session
from mtk.training.join import training_ranks


def train_on_ranks(
    train_here: Callable[..., Artifact], core: PretrainConfig, session: Session, *more: Any
) -> Artifact:
    """``train_here(place, core, session, *more)`` on every rank that ``core`` asks for.

    Starts ``--nproc`` local ranks, unless torchrun or Slurm has started this process as one of
    its ranks. Ranks import ``train_here`` and take what else is given pickled.
    """
    device = training_device(core.runtime).type
    place = find_place(device)
    if place.started_by != "alone" or core.parallel.nproc == 1:
        return train_here(place, core, session, *more)
    artifact: Artifact = launch(
        train_here,
        (core, session.of_rank(0), *more),
        core.parallel.nproc,
        device=device,
        timeout=core.parallel.timeout_seconds,
    )
    return artifact


@contextmanager
def joined(place: Place, core: PretrainConfig) -> Iterator[Ranks]:
    """The ranks of the training while the block runs. Raises LayoutError for a number of them
    that the layout is not for."""
    if place.world != core.world:
        rule = f"the layout is for {core.world} ranks, and {place.world} were started"
        raise LayoutError([Problem("parallel.nproc", core.parallel.nproc, rule)])
    with fitting_warnings(first=place.rank == 0), training_ranks(place, core) as ranks:
        yield ranks
