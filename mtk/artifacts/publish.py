"""Publishing: temporary place -> fsync -> rename -> marker, so nothing is half-written."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from mtk.artifacts.hashing import sha256_file
from mtk.artifacts.manifest import (
    MARKER,
    Artifact,
    FileEntry,
    InputRecord,
    check_sizes,
    find_markers,
    read_manifest,
)
from mtk.artifacts.staging import remove_leftovers, staging_prefix, sync_folder
from mtk.config import config_digest, to_dict
from mtk.errors import ArtifactError

LIBRARIES = (
    "mtk",
    "torch",
    "numpy",
    "tokenizers",
    "safetensors",
    "transformers",
    "nltk",
    "ftfy",
    "py3langid",
    "publicsuffixlist",
)


@dataclass
class Publication:
    """An artifact being written.

    folder: where the stage writes its files; they move to their place on success.
    The stage may fill in ``metrics`` and append to ``inputs`` before the block ends;
    afterwards ``artifact`` holds the complete artifact.
    """

    folder: Path
    kind: str
    stage: str
    config: Any
    inputs: list[InputRecord]
    command: str
    metrics: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    finished: Artifact | None = None

    @property
    def artifact(self) -> Artifact:
        if self.finished is None:
            raise ValueError("the artifact is complete only after its publishing block")
        return self.finished

    def build(self, marker: Path, files: Sequence[FileEntry]) -> Artifact:
        ended = time.time()
        return Artifact(
            marker=marker,
            kind=self.kind,
            stage=self.stage,
            config=to_dict(self.config),
            config_digest=config_digest(self.config),
            inputs=tuple(self.inputs),
            files=tuple(files),
            metrics=dict(self.metrics),
            versions=library_versions(),
            command=self.command or f"mtk {self.stage} --config {marker}",
            timings={
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
                "seconds": round(ended - self.started, 3),
            },
        )


@contextmanager
def publish_directory(
    final: str | Path,
    *,
    kind: str,
    stage: str,
    config: Any,
    inputs: Sequence[InputRecord] = (),
    command: str = "",
    force: bool = False,
) -> Iterator[Publication]:
    """Write a directory artifact: yields a staging folder, publishes it if no error is raised.

    The marker is written into the staging folder last, then one rename publishes both.
    An existing output is only replaced with ``force``. Raises ArtifactError.
    """
    final = Path(final)
    marker = final / MARKER
    _refuse_existing(final, marker, force)
    with _staging(final.parent, final.name) as folder:
        publication = Publication(folder, kind, stage, config, list(inputs), command)
        yield publication
        files = _entries(folder)
        _sync_tree(folder)
        finished = publication.build(marker, files)
        write_json_atomically(folder / MARKER, finished.to_dict())
        _replace_directory(folder, final)
        publication.finished = finished


@contextmanager
def publish_prefix(
    prefix: str | Path,
    *,
    kind: str,
    stage: str,
    config: Any,
    inputs: Sequence[InputRecord] = (),
    command: str = "",
    force: bool = False,
) -> Iterator[Publication]:
    """Write an artifact of files ``{prefix}...`` beside each other, with marker
    ``{prefix}.artifact.json``.

    The stage writes files whose names start with ``Path(prefix).name`` into the staging
    folder. Existing complete artifacts need ``force``. Raises ArtifactError.
    """
    prefix = Path(prefix)
    marker = prefix.with_name(f"{prefix.name}.{MARKER}")
    _refuse_existing(marker, marker, force)
    with _staging(prefix.parent, prefix.name) as folder:
        publication = Publication(folder, kind, stage, config, list(inputs), command)
        yield publication
        files = _entries(folder)
        stray = [f.path for f in files if not f.path.startswith(prefix.name)]
        if stray:
            raise ValueError(f"files {stray} do not start with the prefix {prefix.name}")
        _sync_tree(folder)
        finished = publication.build(marker, files)
        _remove_replaced(marker)
        with ExitStack() as undo:
            for entry in files:
                target = prefix.parent / entry.path
                target.parent.mkdir(parents=True, exist_ok=True)
                undo.callback(target.unlink, missing_ok=True)
                (folder / entry.path).replace(target)
            sync_folder(prefix.parent)
            undo.callback(marker.unlink, missing_ok=True)
            write_json_atomically(marker, finished.to_dict())
            undo.pop_all()  # whatever stopped this before left nothing that looks like data
        publication.finished = finished


def _remove_replaced(marker: Path) -> None:
    """Unpublish what ``marker`` describes: it, then its files, so that a reader never finds
    an old index beside new data."""
    if not marker.is_file():
        return
    try:
        old = [entry.path for entry in read_manifest(marker).files]
    except ArtifactError:
        old = []
    marker.unlink()
    for path in old:
        (marker.parent / path).unlink(missing_ok=True)
    for folder in {(marker.parent / path).parent for path in old} - {marker.parent}:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def completed(
    path: str | Path, *, stage: str, config: Any, inputs: Sequence[InputRecord]
) -> Artifact | None:
    """The artifact at ``path`` if it is complete and was made from this config and these
    inputs: the stage can then be skipped. None otherwise."""
    found = (_same(marker, stage, config, inputs) for marker in find_markers(path))
    return next((artifact for artifact in found if artifact is not None), None)


def _same(marker: Path, stage: str, config: Any, inputs: Sequence[InputRecord]) -> Artifact | None:
    try:
        artifact = read_manifest(marker)
        check_sizes(artifact)
    except ArtifactError:
        return None
    wanted = sorted((item.role, item.content) for item in inputs)
    found = sorted((item.role, item.content) for item in artifact.inputs)
    same = artifact.stage == stage and artifact.config_digest == config_digest(config)
    return artifact if same and wanted == found else None


def library_versions() -> dict[str, str]:
    """Versions of what can influence results, without importing any of it."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def write_json_atomically(path: Path, value: Mapping[str, Any]) -> None:
    """Temporary file -> fsync -> rename -> fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


@contextmanager
def _staging(parent: Path, name: str) -> Iterator[Path]:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(parent, name)
        folder = Path(tempfile.mkdtemp(prefix=staging_prefix(name), dir=parent))
    except OSError as error:
        raise ArtifactError(f"{parent} cannot be written to: {error.strerror}.") from error
    # mkdtemp makes it private; published files follow the user's umask instead.
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_existing(what: Path, marker: Path, force: bool) -> None:
    if marker.is_file() and not force:
        raise ArtifactError(
            f"{what} already holds an artifact made from another configuration or other inputs. "
            f"Choose another place, or replace it with --force."
        )
    if what.is_dir() and any(what.iterdir()) and not marker.is_file() and not force:
        raise ArtifactError(
            f"{what} exists, is not empty and is not a complete artifact. Choose another place, "
            f"or replace it with --force."
        )


def _entries(folder: Path) -> list[FileEntry]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, sha256_file(path))
        for path in paths
    ]


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync_folder(path)


def _replace_directory(source: Path, final: Path) -> None:
    """Rename ``source`` to ``final``; an old ``final`` is set aside first, then deleted."""
    aside = source.with_name(f"{source.name}-old")
    if final.exists():
        final.replace(aside)
    source.replace(final)
    sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)
