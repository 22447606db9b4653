"""Artifacts: what stages leave on disk, with digests and lineage.

An artifact is a set of files with a marker (``artifact.json``, or ``P.artifact.json``
for outputs that share a prefix ``P``). The marker is written last; without it the
artifact does not exist to any reader.
"""

from mtk.artifacts.lineage import input_path, lineage_lines, verify_lineage
from mtk.artifacts.manifest import (
    Artifact,
    FileEntry,
    InputRecord,
    find_marker,
    input_file,
    open_artifact,
    verify,
)
from mtk.artifacts.publish import (
    Publication,
    completed,
    publish_directory,
    publish_prefix,
)
from mtk.artifacts.staging import remove_leftovers

__all__ = [
    "Artifact",
    "FileEntry",
    "InputRecord",
    "Publication",
    "completed",
    "find_marker",
    "input_file",
    "input_path",
    "lineage_lines",
    "open_artifact",
    "publish_directory",
    "publish_prefix",
    "remove_leftovers",
    "verify",
    "verify_lineage",
]
