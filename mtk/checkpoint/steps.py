"""Step folders: naming, finding the newest complete one, keeping the last N."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from mtk.artifacts.manifest import MARKER, open_artifact
from mtk.errors import ArtifactError, CheckpointError

_NAME = re.compile(r"step_(\d{8,})")


def step_folder(directory: str | Path, step: int) -> Path:
    return Path(directory) / f"step_{step:08}"


def complete_steps(directory: str | Path) -> list[int]:
    """Steps whose folder has its marker and all files in their recorded sizes, ascending."""
    return [step for step, damage in _marked_steps(directory) if not damage]


def damaged_steps(directory: str | Path) -> list[tuple[int, str]]:
    """Steps that were published but cannot be opened now, ascending, with the reason.

    A killed run leaves no such folder: the marker comes last and goes first.
    """
    return [(step, damage) for step, damage in _marked_steps(directory) if damage]


def _marked_steps(directory: str | Path) -> list[tuple[int, str]]:
    found = []
    for folder in Path(directory).glob("step_*"):
        match = _NAME.fullmatch(folder.name)
        if match and (folder / MARKER).is_file():
            damage = ""
            try:
                open_artifact(folder, "checkpoint")
            except ArtifactError as error:
                damage = str(error)
            found.append((int(match[1]), damage))
    return sorted(found)


def latest_step(directory: str | Path) -> int | None:
    """The newest complete step, or None."""
    steps = complete_steps(directory)
    return steps[-1] if steps else None


def checkpoint_folder(path: str | Path) -> Path:
    """The step folder meant by ``path``: itself, or the newest complete one inside.

    Raises CheckpointError, naming half-written folders if that is all there is.
    """
    path = Path(path)
    if (path / MARKER).is_file():
        open_artifact(path, "checkpoint")
        return path
    step = latest_step(path)
    if step is not None:
        return step_folder(path, step)
    torn = sorted(p.name for p in path.glob("step_*")) if path.is_dir() else []
    if torn:
        listed = ", ".join(torn)
        raise CheckpointError(f"{path} holds no complete checkpoint ({listed} incomplete).")
    raise CheckpointError(f"{path} is not a checkpoint and holds none. Check the path.")


def prune_steps(directory: str | Path, keep: int, best: int | None = None) -> None:
    """Delete all but the ``keep`` newest complete steps and the ``best``; 0 keeps all."""
    if keep:
        for step in complete_steps(directory)[:-keep]:
            if step == best:
                continue
            folder = step_folder(directory, step)
            # Without its marker the folder no longer exists to a reader, even half-deleted.
            (folder / MARKER).unlink()
            shutil.rmtree(folder)
