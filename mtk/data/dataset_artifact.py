"""A ``--data-path`` prefix to its files, its manifest and the tokenizer it was made with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from mtk.artifacts import Artifact, InputRecord, open_artifact
from mtk.artifacts.hashing import sha256_file
from mtk.artifacts.manifest import MARKER, owner_of
from mtk.data.indexed_dataset import IndexedDataset, bin_path, idx_path
from mtk.errors import ArtifactError, DataError


def tokenizer_folder(name: str) -> str:
    """Where a dataset artifact with prefix ``name`` keeps its tokenizer."""
    return f"{name}.tokenizer"


@dataclass(frozen=True)
class DatasetInfo:
    """A dataset as training sees it.

    artifact and what follows is None for files that mtk did not write.
    """

    prefix: Path
    artifact: Artifact | None
    tokenizer_folder: Path | None
    tokenizer_fingerprint: str | None
    vocab_size: int | None
    eod: int | None

    def open(self) -> IndexedDataset:
        """The sequences. Raises DataError if the files are damaged."""
        return IndexedDataset(self.prefix)

    def input_record(self, role: str) -> InputRecord:
        """For the manifest of what is made from it; foreign files are hashed."""
        if self.artifact is not None:
            return self.artifact.as_input(role)
        index, tokens = idx_path(self.prefix), bin_path(self.prefix)
        nested = InputRecord(f"{role} index", "file", str(index), sha256_file(index))
        return InputRecord(role, "file", str(tokens), sha256_file(tokens), inputs=(nested,))


def open_dataset(prefix: str | Path) -> DatasetInfo:
    """Find the files and the manifest of ``prefix``, e.g. ``data/wiki_text_document``.

    Raises DataError if a file is missing (naming prefixes that exist nearby) and
    ArtifactError if a file's size is not the one its manifest records.
    """
    prefix = _without_suffix(Path(prefix))
    missing = [path for path in (bin_path(prefix), idx_path(prefix)) if not path.is_file()]
    if missing:
        raise DataError(f"{missing[0]} does not exist{_hint(prefix)}")
    owner = owner_of(bin_path(prefix))
    if owner is None:
        return DatasetInfo(prefix, None, None, None, None, None)
    artifact = open_artifact(owner.marker, "dataset")
    folder = artifact.folder / tokenizer_folder(artifact.path.name)
    return DatasetInfo(
        prefix=prefix,
        artifact=artifact,
        tokenizer_folder=folder if folder.is_dir() else None,
        tokenizer_fingerprint=artifact.metrics.get("tokenizer_fingerprint"),
        vocab_size=artifact.metrics.get("vocab_size"),
        eod=artifact.metrics.get("eod"),
    )


def _without_suffix(prefix: Path) -> Path:
    """A file of the pair is taken as its prefix."""
    if prefix.suffix in (".bin", ".idx") and not bin_path(prefix).is_file():
        return prefix.with_suffix("")
    return prefix


def _hint(prefix: Path) -> str:
    if not prefix.parent.is_dir():
        return f": there is no folder {prefix.parent}. Correct --data-path."
    nearby = sorted(path.name.removesuffix(".idx") for path in prefix.parent.glob("*.idx"))
    if not nearby:
        return f", and {prefix.parent} holds no dataset. mtk preprocess writes them."
    extended = [name for name in nearby if name.startswith(prefix.name)]
    close = extended or difflib.get_close_matches(prefix.name, nearby, n=3, cutoff=0.4)
    if close:
        return f". Did you mean {' or '.join(str(prefix.parent / name) for name in close[:3])}?"
    return f". Datasets in {prefix.parent}: {', '.join(nearby[:10])}."


def refuse_foreign(paths: Iterable[Path], output: str, *, force: bool) -> None:
    """Refuse to overwrite files that are not part of the artifact with the prefix ``output``.

    Files without a manifest may be what a killed publication left (its staging folder is
    then still there) or another's: only the former may go. Raises ArtifactError.
    """
    marker = Path(f"{output}.{MARKER}")
    leftover = any(marker.parent.glob(f".{escape(Path(output).name)}.partial-*"))
    if force or leftover or marker.is_file():
        return
    for path in paths:
        if path.exists():
            raise ArtifactError(
                f"{path} exists, and no {marker.name} says that mtk wrote it. Choose another "
                f"place for the output, or replace it with --force."
            )


def pair(prefix: str | Path) -> tuple[Path, Path]:
    """The two files of a dataset."""
    return bin_path(prefix), idx_path(prefix)
