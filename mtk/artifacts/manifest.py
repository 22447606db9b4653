"""The manifest of an artifact: reading, writing, verifying.

``artifact.json`` (schema version 1) holds kind, stage, resolved config, inputs by
digest (each with its own inputs, so the chain survives when an input is deleted),
files with size and SHA-256, metrics, library versions, the exact command, timings.
The artifact's digest is the hash of kind and file contents, not of names or times.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mtk.artifacts.hashing import sha256_file, sha256_json
from mtk.errors import ArtifactError, DataError

SCHEMA_VERSION = 1
MARKER = "artifact.json"

Kind = Literal[
    "file",
    "corpus",
    "tokenizer",
    "dataset",
    "checkpoint",
    "hf_model",
    "quantized_model",
    "evaluation",
    "retrieval_index",
]


@dataclass(frozen=True)
class FileEntry:
    """One file: path relative to the marker's folder, bytes, hex SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class InputRecord:
    """Something an artifact was made from. role: what it was used as ("corpus", "model", ...).
    part: the file of an artifact of several that was used; "" for all of it."""

    role: str
    kind: str
    path: str
    digest: str
    stage: str = ""
    inputs: tuple[InputRecord, ...] = ()
    part: str = ""

    @property
    def content(self) -> str:
        """What was read, wherever it lies: digest and part."""
        return f"{self.digest} {self.part}" if self.part else self.digest

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InputRecord:
        nested = tuple(cls.from_dict(item) for item in data.get("inputs", ()))
        return cls(
            role=data["role"],
            kind=data["kind"],
            path=data["path"],
            digest=data["digest"],
            stage=data.get("stage", ""),
            inputs=nested,
            part=data.get("part", ""),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "role": self.role,
            "kind": self.kind,
            "path": self.path,
            "digest": self.digest,
            "stage": self.stage,
            "inputs": [item.to_dict() for item in self.inputs],
            **({"part": self.part} if self.part else {}),
        }


@dataclass(frozen=True)
class Artifact:
    """A complete artifact. marker: path of its manifest file."""

    marker: Path
    kind: str
    stage: str
    config: Mapping[str, Any]
    config_digest: str
    inputs: tuple[InputRecord, ...]
    files: tuple[FileEntry, ...]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    timings: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder that the files' paths are relative to."""
        return self.marker.parent

    @property
    def path(self) -> Path:
        """What a user passes on: the directory, or the shared prefix of the files."""
        if self.marker.name == MARKER:
            return self.marker.parent
        return self.marker.with_name(self.marker.name.removesuffix(f".{MARKER}"))

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the content: kind and every file's role-free name, size and hash."""
        prefix = "" if self.marker.name == MARKER else self.path.name
        files = sorted((f.path.removeprefix(prefix), f.size, f.sha256) for f in self.files)
        return sha256_json({"kind": self.kind, "files": files})

    def as_input(self, role: str) -> InputRecord:
        return InputRecord(role, self.kind, str(self.path), self.digest, self.stage, self.inputs)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "stage": self.stage,
            "digest": self.digest,
            "config_digest": self.config_digest,
            "command": self.command,
            "config": dict(self.config),
            "inputs": [item.to_dict() for item in self.inputs],
            "files": [vars(entry) for entry in self.files],
            "metrics": dict(self.metrics),
            "versions": dict(self.versions),
            "timings": dict(self.timings),
        }


def find_marker(path: str | Path) -> Path | None:
    """The marker for a directory, prefix, member file or marker path; None if absent."""
    return next(iter(find_markers(path)), None)


def find_markers(path: str | Path) -> list[Path]:
    """All that :func:`find_marker` chooses from: a folder and a prefix may share a name."""
    path = Path(path)
    candidates = [path / MARKER]
    if path.name not in ("", ".."):
        candidates.append(path.with_name(f"{path.name}.{MARKER}"))
    if path.name.endswith(MARKER):
        candidates.insert(0, path)
    found = [marker for marker in candidates if marker.is_file()]
    if not found and path.is_file():
        owner = owner_of(path)
        found = [] if owner is None else [owner.marker]
    return found


def open_artifact(path: str | Path, *kinds: str) -> Artifact:
    """Read a complete artifact; refuse a missing marker, another kind, or changed sizes.

    Raises ArtifactError. Contents are only hashed by :func:`verify`.
    """
    found = [read_manifest(marker) for marker in find_markers(path)]
    if not found:
        state = "has no artifact.json, so it is incomplete" if Path(path).exists() else "is absent"
        raise ArtifactError(f"{path} {state}. Run the stage that writes it, or correct the path.")
    artifact = next((a for a in found if not kinds or a.kind in kinds), found[0])
    if kinds and artifact.kind not in kinds:
        wanted = " or ".join(kinds)
        raise ArtifactError(f"{path} is a {artifact.kind} artifact, but a {wanted} is needed here.")
    check_sizes(artifact)
    return artifact


def read_manifest(marker: Path) -> Artifact:
    """Parse a manifest file. Raises ArtifactError for a damaged or newer one."""
    try:
        data = json.loads(marker.read_text(encoding="utf-8"))
        if data["schema_version"] > SCHEMA_VERSION:
            raise ArtifactError(
                f"{marker} has schema version {data['schema_version']}, this mtk reads up to "
                f"{SCHEMA_VERSION}. Use a newer mtk."
            )
        artifact = Artifact(
            marker=marker,
            kind=data["kind"],
            stage=data["stage"],
            config=data["config"],
            config_digest=data["config_digest"],
            inputs=tuple(InputRecord.from_dict(item) for item in data["inputs"]),
            files=tuple(FileEntry(**entry) for entry in data["files"]),
            metrics=data["metrics"],
            versions=data["versions"],
            command=data["command"],
            timings=data["timings"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{marker} is not a readable manifest: {error!r}.") from error
    if artifact.digest != data.get("digest"):
        raise ArtifactError(f"{marker} was edited: its digest does not match its list of files.")
    return artifact


def check_sizes(artifact: Artifact) -> None:
    """Every listed file is there with its recorded size. Raises ArtifactError."""
    for entry in artifact.files:
        path = artifact.folder / entry.path
        found = path.stat().st_size if path.is_file() else None
        if found != entry.size:
            what = "is missing" if found is None else f"has {found} bytes"
            raise ArtifactError(
                f"{path} {what}, its manifest {artifact.marker.name} records {entry.size} bytes. "
                f"Restore the file, or remove the artifact and run its stage again."
            )


def verify(artifact: Artifact) -> None:
    """Hash every file and compare with the manifest. Raises ArtifactError."""
    check_sizes(artifact)
    for entry in artifact.files:
        path = artifact.folder / entry.path
        found = sha256_file(path)
        if found != entry.sha256:
            raise ArtifactError(
                f"{path} changed after it was published: SHA-256 {found[:16]}..., the manifest "
                f"records {entry.sha256[:16]}.... Restore it or run its stage again."
            )


def input_file(path: str | Path, role: str) -> InputRecord:
    """A plain file as an input; an artifact's record if the file belongs to one.

    Raises DataError when there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file (used as {role}).")
    artifact = owner_of(path)
    if artifact is not None:
        verify(artifact)
        record = artifact.as_input(role)
        if len(artifact.files) == 1:
            return record
        prefix = "" if artifact.marker.name == MARKER else artifact.path.name
        return dataclasses.replace(record, part=path.name.removeprefix(prefix))
    return InputRecord(role, "file", os.fspath(path), sha256_file(path))


def owner_of(path: str | Path) -> Artifact | None:
    """The complete artifact that lists the file ``path``: of its folder, or of a prefix.

    Raises ArtifactError for a damaged manifest.
    """
    path = Path(path)
    markers = [path.parent / MARKER]
    markers += sorted(
        marker
        for marker in path.parent.glob(f"*.{MARKER}")
        if path.name.startswith(marker.name.removesuffix(f".{MARKER}"))
    )
    for marker in markers:
        if marker.is_file():
            artifact = read_manifest(marker)
            if any(artifact.folder / entry.path == path for entry in artifact.files):
                return artifact
    return None
