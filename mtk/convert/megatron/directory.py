"""Where the files of a Megatron ``torch`` checkpoint lie: tracker, iteration, ranks.

Nothing here is opened but the tracker, and no name from it leaves the folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mtk.errors import ConversionError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
# The first as Megatron writes it; the second where the optimizer has files of its own.
FILES = ("model_optim_rng.pt", "model_rng.pt")
RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")
# What the other formats of Megatron leave in an iteration's folder.
OTHER_FORMATS = (".metadata", "metadata.json", "common.pt")


@dataclass(frozen=True)
class RankFile:
    """One rank's file; numbers: those of its folder's name, tensor rank first."""

    path: Path
    numbers: tuple[int, ...]


def is_megatron(path: Path) -> bool:
    """Whether ``path`` is a Megatron checkpoint, or one iteration of it."""
    return (path / TRACKER).is_file() or _has_ranks(path)


def _has_ranks(path: Path) -> bool:
    return any(found.is_dir() for found in path.glob("mp_rank_*"))


def iteration_folder(path: Path) -> Path:
    """The folder with the ranks: ``path`` itself, or what its tracker names.

    Raises ConversionError for a tracker that is no number and not ``release``.
    """
    if _has_ranks(path):
        return path
    tracker = path / TRACKER
    try:
        text = tracker.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{tracker} cannot be read: {error}.") from error
    if re.fullmatch(r"[0-9]{1,12}", text) is None and text != RELEASE:
        raise ConversionError(
            f"{tracker} says {text[:60]!r}; it must be an iteration's number or 'release'."
        )
    folder = path / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise ConversionError(f"{tracker} says {text}, but {folder} does not exist.")
    return folder


def rank_files(folder: Path) -> list[RankFile]:
    """The files of all ranks, sorted. Raises ConversionError for odd or missing ones."""
    found = []
    for path in sorted(folder.glob("mp_rank_*")):
        match = RANK.fullmatch(path.name)
        held = [path / name for name in FILES if (path / name).is_file()]
        if match is None or not path.is_dir():
            raise ConversionError(f"{path} is no folder of a rank (mp_rank_TT[_PPP][_EEE]).")
        if not held:
            raise ConversionError(f"{path} has neither {' nor '.join(FILES)}.")
        numbers = tuple(int(number) for number in match.groups() if number is not None)
        found.append(RankFile(held[0], numbers))
    if not found:
        raise ConversionError(_no_ranks(folder))
    if len({len(file.numbers) for file in found}) > 1:
        names = [file.path.parent.name for file in found]
        raise ConversionError(f"{folder}: ranks are numbered in different ways ({names[:4]}).")
    return found


def input_files(path: Path) -> list[Path]:
    """Everything a conversion reads, for its manifest."""
    tracker = path / TRACKER
    ranks = [file.path for file in rank_files(iteration_folder(path))]
    return [tracker, *ranks] if tracker.is_file() else ranks


def _no_ranks(folder: Path) -> str:
    others = [name for name in OTHER_FORMATS if (folder / name).exists()]
    if others:
        return (
            f"{folder} is a checkpoint of another format of Megatron ({others[0]}); mtk reads "
            f"'torch'. Write it again with Megatron's --ckpt-convert-format torch."
        )
    return f"{folder} has no folders mp_rank_TT[_PPP][_EEE]."
