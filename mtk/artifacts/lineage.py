"""The chain of digests from an artifact back to the corpus."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mtk.artifacts.hashing import sha256_file
from mtk.artifacts.manifest import (
    MARKER,
    Artifact,
    InputRecord,
    find_markers,
    read_manifest,
    verify,
)
from mtk.errors import ArtifactError

Checked = dict[tuple[str, str], str]


def verify_lineage(artifact: Artifact) -> Checked:
    """Check the artifact and everything it was made from.

    Returns, for every (path, digest) of the chain, "verified" (files hashed, digest
    equal) or "gone" (deleted since; its digest is still part of the chain). Raises
    ArtifactError as soon as a file or digest differs.
    """
    verify(artifact)
    checked: Checked = {(str(artifact.path), artifact.digest): "verified"}
    for record in artifact.inputs:
        _verify_record(record, artifact.folder.resolve(), checked)
    return checked


def _verify_record(record: InputRecord, home: Path, checked: Checked) -> None:
    key = (record.path, record.digest)
    if key not in checked:
        checked[key] = _state(record, home)
        for nested in record.inputs:
            _verify_record(nested, home, checked)


def _state(record: InputRecord, home: Path) -> str:
    path = Path(record.path)
    found = _digest_at(path, record)
    if found == record.digest:
        return "verified"
    # What stands under its absolute name is the input itself, changed or not.
    places = _other_places(path, home) if found is None or not path.is_absolute() else ()
    if any(_digest_at(place, record) == record.digest for place in places):
        return "verified"
    if found is None:
        return "gone"
    raise ArtifactError(
        f"{path} ({record.role}) is not what was used: digest {found[:16]}..., the chain "
        f"records {record.digest[:16]}.... It was replaced after the fact."
    )


def _digest_at(path: Path, record: InputRecord) -> str | None:
    """Of what lies at ``path``; None if there is nothing. Verifies an artifact that fits."""
    if record.kind == "file":
        return sha256_file(path) if path.is_file() else None
    artifacts = [read_manifest(marker) for marker in find_markers(path)]
    same = [artifact for artifact in artifacts if artifact.digest == record.digest]
    for artifact in same:
        verify(artifact)
    return (same or artifacts)[0].digest if artifacts else None


def input_path(record: InputRecord, home: Path, *, verify_digest: bool = True) -> Path | None:
    """The file that an input was, where it was recorded, or moved along with the artifact in
    ``home``; None if it is gone. An artifact of several files needs the record's part.

    verify_digest: hash the file. Raises ArtifactError if another content stands there.
    """
    recorded = Path(record.path)
    different: Path | None = None
    for place in (recorded, *_other_places(recorded, home.resolve())):
        file = _file_at(place, record)
        if file is None:
            continue
        path, digest = file
        if not verify_digest or sha256_file(path) == digest:
            return path
        different = different or path
    if different is None:
        return None
    raise ArtifactError(
        f"{different} ({record.role}) is not what was used: its SHA-256 is not the one that the "
        f"manifest records. It was replaced after the fact."
    )


def _file_at(place: Path, record: InputRecord) -> tuple[Path, str] | None:
    """The recorded file below ``place`` and the digest that it should have."""
    if record.kind == "file":
        return (place, record.digest) if place.is_file() else None
    for marker in find_markers(place):
        artifact = read_manifest(marker)
        prefix = "" if marker.name == MARKER else artifact.path.name
        for entry in artifact.files:
            wanted = len(artifact.files) == 1 or entry.path.removeprefix(prefix) == record.part
            if artifact.digest == record.digest and wanted:
                return artifact.folder / entry.path, entry.sha256
    return None


def _other_places(path: Path, home: Path) -> Iterator[Path]:
    """Where else an input may lie: recorded from another working directory, or moved along
    with the artifact (in ``home``). Only its digest can confirm it."""
    folders = (home, *home.parents)
    if not path.is_absolute():
        yield from (folder / path for folder in folders)
    else:
        tails = [Path(*path.parts[start:]) for start in range(1, len(path.parts))]
        yield from (folder / tail for folder in folders for tail in tails)


def lineage_lines(artifact: Artifact, checked: Checked | None = None) -> list[str]:
    """The chain as an indented tree, newest first; ``checked`` adds each node's state."""
    state = _label(checked, str(artifact.path), artifact.digest)
    lines = [f"{artifact.kind}  {artifact.path}  sha256:{artifact.digest[:16]}{state}"]
    for index, record in enumerate(artifact.inputs):
        lines += _record_lines(record, "", index == len(artifact.inputs) - 1, checked)
    return lines


def _record_lines(
    record: InputRecord, indent: str, last: bool, checked: Checked | None
) -> list[str]:
    branch, deeper = ("└─ ", "   ") if last else ("├─ ", "│  ")
    state = _label(checked, record.path, record.digest)
    part = f" ({record.part})" if record.part else ""
    lines = [
        f"{indent}{branch}{record.role}: {record.kind}  {record.path}{part}  "
        f"sha256:{record.digest[:16]}{state}"
    ]
    for index, nested in enumerate(record.inputs):
        is_last = index == len(record.inputs) - 1
        lines += _record_lines(nested, indent + deeper, is_last, checked)
    return lines


def _label(checked: Checked | None, path: str, digest: str) -> str:
    return "" if checked is None else f"  [{checked.get((path, digest), 'unchecked')}]"
